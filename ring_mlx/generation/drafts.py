"""Drafts from the text itself: what followed its last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

MOST_TOKENS = 7
LENGTHS = (6, 4, 3, 2)  # of n-grams, the longest first
MODEL = -1  # in the place of a length: a draft model's
FORCED = -2  # what a grammar forces, which is never wrong
SHIFT = 20  # bits of a token id within an n-gram's key
MASKS = {n: (1 << SHIFT * n) - 1 for n in LENGTHS}


class Draft(NamedTuple):
    """Tokens that may come next, found by the last ``length`` tokens."""

    tokens: list[int]
    length: int


class Drafter(Protocol):
    """Says which tokens may follow a text.

    Where drafting takes time, there is a method ``guess`` too: the next token as far as that is known without work, and by
    which n-gram or model more would be drafted.
    """

    def add(self, token: int) -> None:
        """Take the next token of the text."""

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next, or none."""


@dataclass
class Counts:
    """Tokens of one answer that were drafted and read, and those of them that the model chose too."""

    drafted: int = 0
    accepted: int = 0


class PromptLookup:
    """Finds the last tokens earlier in the text, and drafts what followed them there; constant time a token.

    Args:
        tokens: The sequence so far.
        other: A text in which is looked too, though it is no part of the sequence.

    Attributes:
        sequence: The tokens so far; ``began`` of them came before the first that was drafted, for who keeps lookups.
    """

    def __init__(self, tokens: Sequence[int] = (), other: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[int, dict[int, int]] = {n: {} for n in LENGTHS}  # an n-gram's last place, but for its newest
        self._newest: dict[int, int] = {}
        self._last, self.began = 0, 0
        self.sequence: list[int] = []
        for token in (*other, *tokens):
            self._read(token)
        self.sequence += tokens

    def __len__(self) -> int:
        """Tokens in which is looked."""
        return len(self._tokens)

    def add(self, token: int) -> None:
        """Take the next token."""
        self.sequence.append(token)
        self._read(token)

    def follow(self, tokens: Sequence[int], shared: int) -> None:
        """Go on after another sequence, which has the first ``shared`` tokens of this one; what was said here is kept."""
        if shared < len(self.sequence):
            # So that the next n-grams are those of the sequence.
            for token in tokens[max(0, shared - LENGTHS[0]) : shared]:
                self._read(token)
            del self.sequence[shared:]
        for token in tokens[shared:]:
            self.add(token)

    def _read(self, token: int) -> None:
        self._tokens.append(token)
        at = len(self._tokens)
        for n, key in self._newest.items():
            self._ends[n][key] = at - 1
        self._last = (self._last << SHIFT | token) & MASKS[LENGTHS[0]]
        self._newest = {n: self._last & mask for n, mask in MASKS.items() if at >= n}

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next; none where nothing is found."""
        for n, key in self._newest.items():
            start = self._ends[n].get(key)
            if start is not None:
                found = self._tokens[start : start + most]
                while len(found) < most:  # the text repeats itself up to its end
                    found.append(found[len(found) - (len(self._tokens) - start)])
                return Draft(found, n)
        return Draft([], 0)


class Forcing(Protocol):
    """What an answer is held to, as `ring_mlx.generation.constraint.Constraint`."""

    def forced(self) -> list[int]:
        """Tokens that must come after those that it took."""

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may come after those that it took."""


class ForcedOr:
    """Drafts what a constraint forces, or else what another drafter says and the constraint allows.

    The constraint has taken all tokens but the last that was added here.
    """

    def __init__(self, other: Drafter, constraint: Forcing) -> None:
        self._other, self._constraint = other, constraint
        self._guess_other: Callable[[], Draft] = getattr(other, "guess", None) or partial(other.draft, 1)
        self._forced: list[int] = []
        self._last = 0

    def add(self, token: int) -> None:
        """Take the next token."""
        self._other.add(token)
        self._last = token

    def guess(self) -> Draft:
        """The next token, if it is forced as well as one after it, or as the other drafter has it."""
        self._forced = self._constraint.forced()
        return Draft(self._forced[:1], FORCED) if len(self._forced) > 1 else self._guess_other()

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next."""
        if len(self._forced) > 1:
            return Draft(self._forced[1 : most + 1], FORCED)
        found = self._other.draft(most)
        fitting = self._constraint.allowed([self._last, *found.tokens]) if found.tokens else 1
        return Draft(found.tokens[: max(0, fitting - 1)], found.length)
