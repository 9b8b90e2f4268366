"""Facts to find again and the filler that hides them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from ring_mlx.errors import OptionError
from ring_mlx.evaluation.filler import filler
from ring_mlx.evaluation.perplexity import read_text

NAMES = (
    *("Ada", "Boris", "Carla", "David", "Ella", "Felix", "Gina", "Hugo", "Iris", "Jonas", "Karim", "Lena"),
    *("Marco", "Nadia", "Oscar", "Petra", "Rosa", "Sven", "Tara", "Vera", "Wanda", "Yuki"),
)
# Codes, which nobody can guess.
THINGS = ("locker code", "door code")
MOST_FACTS = len(NAMES) * len(THINGS)


class Fact(NamedTuple):
    """A thing of a person, and its value."""

    name: str
    thing: str
    value: str

    @property
    def stated(self) -> str:
        """The sentence that states it."""
        return f"{self.name}'s {self.thing} is {self.value}."

    @property
    def question(self) -> str:
        """The sentence that asks for it."""
        return f"What is {self.name}'s {self.thing}?"


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts about different things."""
    about = rng.sample([(name, thing) for name in NAMES for thing in THINGS], count)
    return [Fact(name, thing, str(rng.randrange(1000, 10000))) for name, thing in about]


def small_talk(rng: random.Random) -> Iterator[str]:
    """Sentences that state no fact of a person, without end."""
    while True:
        yield filler(rng)


def sentences_of(path: Path) -> Iterator[str]:
    """The sentences of a text file, again and again without end.

    Raises:
        OptionError: If it cannot be read or holds no word.
    """
    text = read_text(path, "--filler")
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
    if not sentences:
        raise OptionError(f"--filler {path} holds no sentence; give a text.")
    return cycle(sentences)
