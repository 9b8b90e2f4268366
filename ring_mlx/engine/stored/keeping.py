"""Which of a model's stored snapshots stay within the budget.

The same rule as `SnapshotTree`'s, from what a disk tells: the place where the latest conversation goes on stays longest.
First go conversations that were not used for `STALE_S`, then the latest one's earlier places, then other conversations,
the one used longest ago before the rest and each from its start. A start that conversations share is as old as its own
last use.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

STALE_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Stored:
    """A snapshot on disk, or one that would be there.

    Args:
        name: Its own.
        parent: The name of the longest one that it goes on from, or None.
        offset: How many tokens it has seen.
        kind: Why it was taken.
        used: When it was used last, in seconds.
        sizes: Bytes of its files, by what others that share them call them too.
    """

    name: str
    parent: str | None
    offset: int
    kind: str
    used: float
    sizes: Mapping[Hashable, int]


def in_order(found: Iterable[Stored]) -> list[Stored]:
    """What goes first comes first."""
    named = {s.name: s for s in found}
    age = {s.name: s.used for s in named.values()}
    for s in sorted(named.values(), key=lambda s: -s.offset):
        if s.parent in named and named[s.parent].kind != "system":
            age[s.parent] = max(age[s.parent], age[s.name])
    latest = max(named.values(), key=lambda s: (s.used, s.offset), default=None)
    inner, at = set(), latest
    while at is not None and (at := named.get(at.parent or "")) is not None:
        inner.add(at.name)
    stale = time.time() - STALE_S

    def place(s: Stored) -> tuple[bool, bool, bool, float, int]:
        is_inner = s.name in inner and s.kind != "system"
        return s is latest, age[s.name] >= stale, not is_inner, age[s.name], s.offset

    return sorted(named.values(), key=place)


def kept(found: Iterable[Stored], budget_bytes: int) -> set[str]:
    """The names of those that stay within a budget; what is larger than that takes no other's place."""
    files: set[Hashable] = set()
    stay, total = set(), 0
    for s in in_order(s for s in found if sum(s.sizes.values()) <= budget_bytes)[::-1]:
        total += sum(size for file, size in s.sizes.items() if file not in files)
        if total > budget_bytes:
            break
        files.update(s.sizes)
        stay.add(s.name)
    return stay
