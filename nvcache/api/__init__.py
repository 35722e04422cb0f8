"""The HTTP face of the engine: parse, call the engine, shape the reply. It decides nothing about models, bytes or disks."""
