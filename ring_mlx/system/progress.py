"""Progress of long work: how it is reported, and an estimate of the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """A callable that gets what is done of all, a few words about it, and the seconds left.

    Without ``left_s`` the rest is assumed to be as fast as what is done; infinite means that it is not known yet.
    """

    def __call__(self, done: float, total: float, said: str = "", left_s: float | None = None, /) -> object: ...


# The least part of a kind that must be done before a time is given, since the first steps are slow.
LEAST_SHARE = 0.02


class TimeLeft:
    """The time left of work of several kinds, each at its own speed so far; amounts are in any unit.

    Args:
        expected: Seconds a unit of each kind, until enough of it is done to be measured.
        **amounts: Of each kind.
    """

    def __init__(self, expected: Mapping[str, float] | None = None, /, **amounts: float) -> None:
        self._expected, self._all, self._todo = expected or {}, amounts, dict(amounts)
        self._done, self._took = (dict.fromkeys(amounts, 0.0) for _ in range(2))
        self._since = time.perf_counter()

    def did(self, kind: str, amount: float) -> None:
        """Count work of one kind, the only work since the last call."""
        now = time.perf_counter()
        self._took[kind] += now - self._since
        self._done[kind] += amount
        self._todo[kind] -= amount
        self._since = now

    def left_s(self) -> float:
        """Seconds left; infinite while too little is done of some kind."""
        left = 0.0
        for kind, todo in self._todo.items():
            is_known = todo <= 0 or self._done[kind] >= LEAST_SHARE * self._all[kind]
            if not is_known and kind not in self._expected:
                return math.inf
            speed = self._took[kind] / (self._done[kind] or 1.0) if is_known else self._expected[kind]
            left += max(0.0, todo) * speed
        return left


def duration(seconds: float) -> str:
    """In words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
