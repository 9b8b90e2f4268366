"""Anthropic's Messages API: ``blocks`` and ``request`` read it, ``reply`` answers in it."""
