"""The hybrid model: its config, layers, caches and compiled decode step."""
