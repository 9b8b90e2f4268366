"""Bits for each module from what each number of them costs in bytes and in divergence."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """A form that a module can have: its bytes, and what it adds to the divergence."""

    bits: int
    nbytes: int
    loss: float


def allocate(modules: Sequence[Sequence[Choice]], most_bytes: int) -> list[Choice] | None:
    """The choice of each module, with little loss in all and at most so many bytes; None if the smallest are too large.

    From the smallest forms on, the step that saves most divergence a byte is taken, on each module's lower convex hull; a
    step that no longer fits is passed over. So it is the best but for the last few steps.

    Source: the greedy solution of the multiple-choice knapsack (Sinha and Zoltners 1979).
    """
    hulls = [_hull(choices) for choices in modules]
    at, left = [0] * len(hulls), most_bytes - sum(hull[0].nbytes for hull in hulls)
    if left < 0:
        return None
    steps = [_step(i, hull, 0) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, i, more = heapq.heappop(steps)
        if more > left:
            continue
        left -= more
        at[i] += 1
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(steps, _step(i, hulls[i], at[i]))
    return [hull[place] for hull, place in zip(hulls, at, strict=True)]


def _step(module: int, hull: Sequence[Choice], at: int) -> tuple[float, int, int]:
    """Of a module's next form: minus what it saves a byte, the module, and its bytes."""
    more = hull[at + 1].nbytes - hull[at].nbytes
    return (hull[at + 1].loss - hull[at].loss) / more, module, more


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The forms that are best for some price of a byte, from the smallest on."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / (b.nbytes - a.nbytes)
