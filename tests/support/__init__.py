"""Real servers that the tests and the demo talk to. Nothing of nvcache is imported here."""
