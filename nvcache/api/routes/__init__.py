"""The calls of the API by group. Each parses, checks the caller's scope, asks the engine and shapes the reply; none holds state."""
