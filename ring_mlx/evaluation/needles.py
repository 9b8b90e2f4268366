"""Facts to find again and the filler that hides them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.perplexity import read_text

NAMES = (
    *("Ada", "Boris", "Carla", "David", "Ella", "Felix", "Gina", "Hugo", "Iris", "Jonas", "Karim", "Lena"),
    *("Marco", "Nadia", "Oscar", "Petra", "Rosa", "Sven", "Tara", "Vera", "Wanda", "Yuki"),
)
# Codes, which nobody can guess.
THINGS = ("locker code", "door code")
MOST_FACTS = len(NAMES) * len(THINGS)
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


class Fact(NamedTuple):
    """A thing of a person, and its value."""

    name: str
    thing: str
    value: str

    @property
    def stated(self) -> str:
        return f"{self.name}'s {self.thing} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is {self.name}'s {self.thing}?"


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    about = rng.sample([(name, thing) for name in NAMES for thing in THINGS], count)
    return [Fact(name, thing, str(rng.randrange(1000, 10000))) for name, thing in about]


def filler(rng: random.Random) -> str:
    """Draw a sentence that states no fact about a person."""
    return rng.choice(FILLER).format(time=rng.choice(TIMES), place=rng.choice(PLACES))


def sentences_of(path: Path) -> Iterator[str]:
    """The sentences of a text file, again and again without end; raises OptionError if there are none."""
    text = read_text(path, "--filler")
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
    if not sentences:
        raise OptionError(f"--filler {path} holds no sentence; give a text.")
    return cycle(sentences)
