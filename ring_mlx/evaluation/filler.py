"""Filler sentences that state no fact about a person."""

from __future__ import annotations

import random

PLACES = ("market", "harbour", "library", "station", "park", "bakery", "museum", "school", "beach", "old bridge")
TIMES = ("Today", "Yesterday", "This morning", "Last night", "On Sunday", "After lunch", "Before work", "In the end")
FILLER = (
    "{time} I went to the {place}.",
    "{time} it rained near the {place}.",
    "{time} the {place} was very quiet.",
    "{time} we met at the {place} and talked.",
    "{time} I walked past the {place}.",
    "{time} there was music at the {place}.",
    "The {place} was full of people.",
    "The way to the {place} is long.",
    "I like the {place} a lot.",
    "The {place} is closed for now.",
    "It was a long day.",
    "The weather is fine.",
    "I slept well.",
    "Dinner was good.",
)


def filler(rng: random.Random) -> str:
    """Draw a sentence."""
    return rng.choice(FILLER).format(time=rng.choice(TIMES), place=rng.choice(PLACES))
