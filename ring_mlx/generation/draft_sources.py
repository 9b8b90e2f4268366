"""Where the drafts of one answer after the other come from, and what a user can say about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ring_mlx.errors import OptionError
from ring_mlx.generation.drafts import MOST_TOKENS, Drafter, PromptLookup
from ring_mlx.generation.pace import Pace

SPECULATIONS = f"off, auto or a whole number from 1 to {MOST_TOKENS}"
MOST_ROWS = 4  # sequences at once that may speculate together
KEPT_TOKENS = 4096  # of earlier sequences, beside as many as the present one has


class DraftSource(Protocol):
    """Drafts for the answers of a model, and how many of them to read at once."""

    pace: Pace

    def drafter(self, tokens: Sequence[int]) -> Drafter:
        """What drafts after these tokens, which are one sequence so far; of this sequence only, until it is taken back."""

    def take_back(self, drafter: Drafter) -> None:
        """Take a drafter whose sequence has ended, for one that goes on from it."""


class PromptDrafts:
    """Prompt lookup for one answer after the other; a sequence that goes on is not looked through again.

    Args:
        pace: Kept from answer to answer.
        is_shared: Sequences belong to several people: one drafts from another only if it has the whole of its beginning.
    """

    def __init__(self, pace: Pace, is_shared: bool = False) -> None:
        self.pace, self._is_shared = pace, is_shared
        self._ended: deque[PromptLookup] = deque(maxlen=MOST_ROWS if is_shared else 1)

    def drafter(self, tokens: Sequence[int]) -> PromptLookup:
        """A lookup in these tokens, and in what was said before."""
        found, shared = None, -1
        for lookup in self._ended:
            same = _shared(lookup.sequence, tokens)
            is_too_long = len(lookup) + len(tokens) - same > 2 * len(tokens) + KEPT_TOKENS
            if same >= shared and not is_too_long and (same >= lookup.began or not self._is_shared):
                found, shared = lookup, same
        if found is None:
            found = PromptLookup(tokens)
        else:
            self._ended.remove(found)
            found.follow(tokens, shared)
        found.began = len(tokens)
        return found

    def take_back(self, drafter: Drafter) -> None:
        """Take a lookup whose sequence has ended; in a few of them the next one looks."""
        if isinstance(drafter, PromptLookup):
            self._ended.append(drafter)


class Predicted:
    """As another source of drafts, but looks in a text as well that somebody expects for an answer."""

    def __init__(self, drafts: DraftSource, expected: Sequence[int]) -> None:
        self.pace, self._expected = drafts.pace, expected

    def drafter(self, tokens: Sequence[int]) -> PromptLookup:
        """A lookup in both, which nothing else draws from."""
        return PromptLookup(tokens, self._expected)

    def take_back(self, drafter: Drafter) -> None:
        """Nothing draws from it."""


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of their first tokens two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def check_speculation(value: object) -> None:
    """Raises OptionError unless it is off, auto or a number of tokens."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS
    if not is_count and value not in ("off", "auto"):
        raise OptionError(f"speculate {value!r} is not {SPECULATIONS}; give one of them.")


def pace_of(value: int | str) -> Pace | None:
    """The pace that such a value asks for; None is plain decoding."""
    return Pace(value, always=True) if isinstance(value, int) else Pace() if value == "auto" else None
