"""OpenAI's Responses API: ``items`` and ``request`` read it, ``reply`` answers in it, ``stored`` keeps what was answered."""
