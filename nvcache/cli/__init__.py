"""The commands people and scripts type: words in, a table or JSON out. They hold no logic of the cache; the daemon does the work."""
