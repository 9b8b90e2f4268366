"""Where the drafts of one answer after the other come from, and what a user can say about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ring_mlx.errors import OptionError
from ring_mlx.generation.drafts import MOST_TOKENS, Drafter, Pace, PromptLookup

SPECULATIONS = f"off, auto or a whole number from 1 to {MOST_TOKENS}"
KEPT_TOKENS = 4096  # of earlier sequences, beside as many as the present one has


class DraftSource(Protocol):
    """Drafts for the answers of a model, and how many of them to read at once."""

    pace: Pace

    def drafter(self, tokens: Sequence[int]) -> Drafter:
        """What drafts after these tokens, which are one sequence so far."""


class PromptDrafts:
    """Prompt lookup for one answer after the other; a sequence that goes on is not looked through again.

    Args:
        pace: Kept from answer to answer.
        is_shared: Sequences belong to several people: one drafts from the last only if it has the whole of its beginning.
    """

    def __init__(self, pace: Pace, is_shared: bool = False) -> None:
        self.pace, self._is_shared = pace, is_shared
        self._lookup, self._began = PromptLookup(), 0

    def drafter(self, tokens: Sequence[int]) -> PromptLookup:
        """A lookup in these tokens, and in what was said before."""
        lookup = self._lookup
        pairs = enumerate(zip(lookup.sequence, tokens, strict=False))
        shared = next((n for n, (a, b) in pairs if a != b), min(len(lookup.sequence), len(tokens)))
        is_too_long = len(lookup) + len(tokens) - shared > 2 * len(tokens) + KEPT_TOKENS
        if is_too_long or (self._is_shared and shared < self._began):
            self._lookup = PromptLookup(tokens)
        else:
            lookup.follow(tokens, shared)
        self._began = len(tokens)
        return self._lookup


class Predicted:
    """As another source of drafts, but looks in a text as well that somebody expects for an answer."""

    def __init__(self, drafts: DraftSource, expected: Sequence[int]) -> None:
        self.pace, self._expected = drafts.pace, expected

    def drafter(self, tokens: Sequence[int]) -> PromptLookup:
        """A lookup in both, which nothing else draws from."""
        return PromptLookup(tokens, self._expected)


def check_speculation(value: object) -> None:
    """Raises OptionError unless it is off, auto or a number of tokens."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS
    if not is_count and value not in ("off", "auto"):
        raise OptionError(f"speculate {value!r} is not {SPECULATIONS}; give one of them.")


def pace_of(value: int | str) -> Pace | None:
    """The pace that such a value asks for; None is plain decoding."""
    return Pace(value, always=True) if isinstance(value, int) else Pace() if value == "auto" else None
