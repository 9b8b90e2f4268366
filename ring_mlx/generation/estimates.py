"""What the pace of drafts knows: how often drafts are right, and what steps cost on this machine."""

from __future__ import annotations

import statistics
from collections import deque
from operator import mul

from ring_mlx.generation.drafts import MOST_TOKENS

MEMORIES = (8, 32, 128)  # tokens after which what was seen counts half
KEPT = tuple(0.5 ** (1 / tokens) for tokens in MEMORIES)
LEAST_WEIGHT = 1e-3  # of a memory, so that it can come back
TRUSTED = 0.97  # a memory's weight is this power of its last one, times what it gave to what came
TIMED, FEW = 9, 3  # steps of each length whose median counts; of fewer than so many, the fastest
PLAIN_TIMED = 15  # plain steps whose median counts
# What a step of T tokens costs over one of one token, until it is timed: so much for the second token, and for each further one, but
# at least this part of what the tokens of a shorter step cost. A low guess is tried and corrected; a high one would never be tried.
SECOND, FURTHER, PART = 0.3, 0.1, 0.5
DRAFTED, READ = 0.25, 0.015  # what a draft model's token costs, until it is timed: drafted; read in a text
SLOW = 2.0  # times the usual: a step that takes longer counts as this, since something else took it


class Acceptance:
    """The probability that the next draft is right, by memories of several lengths.

    A short memory follows changes, a long one has less noise. Each counts as much as it foretold of late.
    """

    def __init__(self) -> None:
        self._right = [0.0] * len(MEMORIES)
        self._all = [0.0] * len(MEMORIES)
        self._weights = [1 / len(MEMORIES)] * len(MEMORIES)

    def __call__(self, prior: float, weight: float) -> float:
        """The probability, where ``prior`` counts as much as ``weight`` drafts."""
        return sum(map(mul, self._weights, self._each(prior, weight)))

    def add(self, hit: bool, prior: float, weight: float) -> None:
        """Take whether a draft was right."""
        each = self._each(prior, weight)
        weights = [w**TRUSTED * (p if hit else 1 - p) for w, p in zip(self._weights, each, strict=True)]
        least = LEAST_WEIGHT * sum(weights)
        self._weights = [(w + least) / (sum(weights) + len(weights) * least) for w in weights]
        for n, kept in enumerate(KEPT):
            self._right[n] = self._right[n] * kept + hit
            self._all[n] = self._all[n] * kept + 1

    def forget(self, kept: float) -> None:
        """Let all that was seen count less, and the prior more."""
        self._right, self._all = [n * kept for n in self._right], [n * kept for n in self._all]

    def _each(self, prior: float, weight: float) -> list[float]:
        return [
            (right + prior * weight) / (count + weight) for right, count in zip(self._right, self._all, strict=True)
        ]


class StepCosts:
    """Seconds of a plain step, and over these what steps of several tokens cost, and a draft model's tokens.

    Times of single steps are noisy, and some are far off, so medians count.

    Args:
        rows: Sequences that step together, each by so many tokens.
    """

    def __init__(self, rows: int = 1) -> None:
        self._rows = rows
        self._timed: dict[str, deque[float]] = {}
        self._plain: deque[float] = deque(maxlen=PLAIN_TIMED)
        self._found: dict[int, float] = {}
        self._least_right: float | None = None
        self.plain = 0.0

    @property
    def is_known(self) -> bool:
        """Whether enough plain steps were timed."""
        return len(self._plain) >= FEW

    def step(self, tokens: int) -> float:
        """What a step of so many tokens costs, in plain steps; never less than one."""
        if tokens == 1:
            return 1.0
        if tokens not in self._found:
            self._found[tokens] = max(1.0, self._of(str(tokens)) or self._guess(tokens))
        return self._found[tokens]

    @property
    def least_right(self) -> float:
        """The least probability of a draft's first token with which a step may pay: if all later ones were right."""
        if self._least_right is None:
            self._least_right = min((self.step(T) - 1) / (T - 1) for T in range(2, MOST_TOKENS + 2))
        return self._least_right

    @property
    def drafted(self) -> float:
        """What a token that a model drafts costs, in plain steps."""
        return self._of("drafted") or DRAFTED

    @property
    def read(self) -> float:
        """What a token costs that a draft model reads in a text, in plain steps."""
        return self._of("read") or READ

    @property
    def longest(self) -> int:
        """The most tokens of a step that was timed."""
        return max((int(name) for name in self._timed if name.isdecimal()), default=1)

    def add_plain(self, seconds: float) -> None:
        """Take the seconds of a plain step."""
        self._plain.append(seconds)
        self.plain = statistics.median(self._plain)

    def renew(self) -> None:
        """Have plain steps timed again, as if none was."""
        self._plain.clear()

    def add_step(self, tokens: int, seconds: float) -> None:
        """Take the seconds of a step of several tokens."""
        self._add(str(tokens), seconds)
        self._changed()

    def add_drafted(self, tokens: int, seconds: float) -> None:
        """Take the seconds in which a model drafted so many tokens."""
        self._add("drafted", seconds / tokens)

    def add_read(self, tokens: int, seconds: float) -> None:
        """Take the seconds in which a draft model read so many tokens of a text."""
        self._add("read", seconds / tokens)

    def forget(self) -> None:
        """Guess again where a guess is lower than what was timed: the machine may have been busy then."""
        for name in [n for n in self._timed if n.isdecimal()]:
            if (self._of(name) or 0.0) > _guessed(self._rows * int(name)) / _guessed(self._rows):
                del self._timed[name]
        self._changed()

    def _changed(self) -> None:
        self._found.clear()
        self._least_right = None

    def _of(self, name: str) -> float | None:
        found = self._timed.get(name)
        if not found:
            return None
        return statistics.median(found) if len(found) >= FEW else min(found)

    def _guess(self, tokens: int) -> float:
        """From the longest shorter step that was timed."""
        fewer = next((n for n in range(tokens - 1, 1, -1) if self._of(str(n))), None)
        if fewer is None:
            return _guessed(self._rows * tokens) / _guessed(self._rows)
        known = self.step(fewer)
        further = max(FURTHER * self._rows / _guessed(self._rows), PART * (known - 1) / (fewer - 1))
        return known + further * (tokens - fewer)

    def _add(self, name: str, seconds: float) -> None:
        if self.plain:
            self._timed.setdefault(name, deque(maxlen=TIMED)).append(seconds / self.plain)


def _guessed(tokens: int) -> float:
    """What a step of so many tokens of all rows costs over one of one token."""
    return 1 + SECOND + FURTHER * (tokens - 2) if tokens > 1 else 1.0
