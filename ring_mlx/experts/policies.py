"""Chooses the expert to evict: least recently used, least often used, or all at once.

Knows keys only, not what they stand for.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Protocol

HALF_LIFE_PASSES = 64
# Weights of later passes grow; long before a double overflows, all are scaled down.
LARGEST_EXPONENT = 512.0


class Policy(Protocol):
    """Told of every use, and asked who goes."""

    retains: bool

    def touch(self, key: Hashable) -> None:
        """Note that ``key``, which is held or will be, is used now."""

    def forget(self, key: Hashable) -> None:
        """Note that ``key`` is not held any more."""

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """One that is held and not pinned."""

    def advance(self) -> None:
        """Note that a pass over all layers begins."""


class LRU:
    """The least recently used goes."""

    retains = True

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, None] = OrderedDict()

    def touch(self, key: Hashable) -> None:
        """As `Policy.touch`."""
        self._held[key] = None
        self._held.move_to_end(key)

    def forget(self, key: Hashable) -> None:
        """As `Policy.forget`."""
        self._held.pop(key, None)

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """As `Policy.victim`."""
        return next(key for key in self._held if key not in pinned)

    def advance(self) -> None:
        """As `Policy.advance`."""


class LFU:
    """The one with the lowest sum of its uses goes, of which each counts half as much 64 passes later.

    ::

        score = sum over uses u of 2^(-(now - u) / half_life)

    Scores are kept times 2^(now / half_life), so that only the used one changes. What was thrown out keeps its score.
    """

    retains = True

    def __init__(self, half_life_passes: float = HALF_LIFE_PASSES) -> None:
        self._half_life, self._exponent = half_life_passes, 0.0
        self._scores: dict[Hashable, float] = {}
        self._held: set[Hashable] = set()
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = 0

    def touch(self, key: Hashable) -> None:
        """As `Policy.touch`."""
        self._scores[key] = self._scores.get(key, 0.0) + 2.0**self._exponent
        self._held.add(key)
        self._push(key)
        if len(self._heap) > 8 * len(self._held) + 64:
            self._rebuild()

    def forget(self, key: Hashable) -> None:
        """As `Policy.forget`."""
        self._held.discard(key)

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """As `Policy.victim`."""
        skipped = []
        try:
            while True:
                entry = heapq.heappop(self._heap)
                score, _, key = entry
                if key not in self._held or score != self._scores[key]:
                    continue
                skipped.append(entry)
                if key not in pinned:
                    return key
        finally:
            for entry in skipped:
                heapq.heappush(self._heap, entry)

    def advance(self) -> None:
        """As `Policy.advance`."""
        self._exponent += 1 / self._half_life
        if self._exponent > LARGEST_EXPONENT:
            factor = 2.0**-self._exponent
            self._scores = {key: score * factor for key, score in self._scores.items()}
            self._exponent = 0.0
            self._rebuild()

    def _push(self, key: Hashable) -> None:
        # Between equals, the older entry goes first.
        self._count += 1
        heapq.heappush(self._heap, (self._scores[key], self._count, key))

    def _rebuild(self) -> None:
        entries = sorted(self._heap, key=lambda e: e[1])
        order = dict.fromkeys(e[2] for e in reversed(entries) if e[2] in self._held)
        self._heap = []
        for key in reversed(order):
            self._push(key)


class KeepNone(LRU):
    """Nothing is kept from one layer to the next: the operating system's page cache does all the caching."""

    retains = False


POLICIES: dict[str, type[LRU | LFU]] = {"lru": LRU, "lfu": LFU, "none": KeepNone}
DEFAULT_POLICY = "lfu"
