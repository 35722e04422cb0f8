"""Where weights come from. Sources resolve, list and say where bytes are; they write nothing to the store and know nothing of it."""
