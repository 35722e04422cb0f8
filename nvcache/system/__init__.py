"""The kernel and its tools. Nothing else starts processes, and nothing here decides what to do with what it sees."""
