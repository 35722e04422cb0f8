"""Pure decisions: facts in, decisions out. Nothing here does I/O, reads a clock or an environment, or draws a random number."""
