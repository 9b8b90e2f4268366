"""Conversations, the train/test split and the draws that respect it; knows no task."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from ring_mlx.evaluation.suite import extract_answer

Operands = TypeVar("Operands", bound="tuple[int | str, ...]")

SPLITS = ("train", "test")
HELD_OUT_PER_256 = 13  # 5.08 %
WORDS = tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())


@dataclass(frozen=True)
class Message:
    """One message; only an assistant's has thinking."""

    role: str
    content: str
    thinking: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's; `answer` is what `extract_answer` finds in the last content."""

    messages: tuple[Message, ...]
    task: str
    answer: str


class Turn(NamedTuple):
    """A question with the assistant's thinking and reply."""

    user: str
    thinking: str
    reply: str


class Phrasings(NamedTuple):
    """Format strings for one question; those of `test` never occur in the train split."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def pick(self, rng: random.Random, split: str) -> str:
        """Return a phrasing of the split, half of them held out in test, at times in lower case and unpunctuated."""
        held_out_form = split == "test" and rng.random() < 0.5
        text = rng.choice(self.test if held_out_form else self.train)
        if rng.random() < 0.12 and text[0] != "{":
            text = text[0].lower() + text[1:].rstrip("?.")
        return text


def listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the parts of a text, which are words if no separator is given."""
    return tuple(part.strip() for part in text.split(separator))


@lru_cache(maxsize=100_000)
def held_out(*operands: int | str) -> bool:
    """Return whether these operands, in any order, belong to the test split (about 5 % of all)."""
    key = "|".join(sorted(map(str, operands)))
    return hashlib.sha256(key.encode()).digest()[0] < HELD_OUT_PER_256


def word_held_out(word: str) -> bool:
    """Return whether a word and, because reversing one gives the other, its reverse belong to the test split."""
    return held_out(min(word, word[::-1]))


TEST_WORDS = tuple(word for word in WORDS if word_held_out(word))
TRAIN_WORDS = tuple(word for word in WORDS if not word_held_out(word))


def in_split(split: str, *operands: int | str) -> bool:
    """Return whether these operands may be asked for in the split."""
    return held_out(*operands) == (split == "test")


def steps_allowed(split: str, *pairs: tuple[int, int]) -> bool:
    """Return whether a question's inner operations may be shown: train must not show a held-out pair as a step."""
    return split == "test" or not any(held_out(*pair) for pair in pairs)


def draw(
    sample: Callable[[], Operands],
    split: str,
    steps: Callable[[Operands], Iterable[tuple[int, int]]] = lambda _: (),
) -> Operands:
    """Sample operands until they belong to the split; the pairs of `steps` shown on the way may not be held out."""
    while True:
        operands = sample()
        if in_split(split, *operands) and steps_allowed(split, *steps(operands)):
            return operands


def conversation(task: str, turns: list[Turn]) -> Conversation:
    """Build the conversation of these turns; its answer is the last turn's."""
    messages: list[Message] = []
    for turn in turns:
        messages += [Message("user", turn.user), Message("assistant", turn.reply, turn.thinking)]
    return Conversation(tuple(messages), task, extract_answer(turns[-1].reply))
