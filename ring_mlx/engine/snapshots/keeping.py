"""Which of a model's stored snapshots stay within the budget, and which new ones are worth writing.

The same thought as `SnapshotTree`'s, with what a disk tells: what the latest conversation goes on from stays longest.
Its earlier places go first, then other conversations, the one that was used longest ago before the rest and each from
its start; a conversation that was not used for `STALE_S` goes before all. A start that conversations share is as old
as its own last use.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ring_mlx.engine.snapshots.blocks import Block, Snapshot, Tokens
from ring_mlx.engine.snapshots.files import blob_path
from ring_mlx.engine.snapshots.folder import ModelFolder, remove
from ring_mlx.engine.snapshots.packing import pack_block, pack_rest

STALE_S = 7 * 24 * 3600.0
HEADER_BYTES = 128  # of each array in its file


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


class Keeping:
    """Keeps the budget of a model's folder, under whose lock it is used.

    Args:
        files: The folder.
        kv_bits: As for `Store`.
        manifests: Every good manifest.
        prefixes: Paths of those that are a prefix of tokens, the deepest first.
    """

    def __init__(
        self,
        files: ModelFolder,
        kv_bits: int | None,
        manifests: Callable[[], Iterator[tuple[Path, dict[str, Any]]]],
        prefixes: Callable[[Tokens], list[Path]],
    ) -> None:
        self._files, self._kv_bits, self._manifests, self._prefixes = files, kv_bits, manifests, prefixes

    def collect(self, budget_bytes: int) -> int:
        """Remove what exceeds the budget and what nothing names; returns the bytes freed."""
        found = self._stored()
        stay = kept(found.values(), budget_bytes)
        for path, stored in found.items():
            if stored.name not in stay:
                remove(path)
        return self._files.sweep({str(blob) for s in found.values() if s.name in stay for blob in s.sizes})

    def worth_saving(self, snapshots: Iterable[Snapshot], budget_bytes: int) -> list[tuple[Snapshot, float]]:
        """Those that will stay once they are written, parents first, with the times of their use.

        The others are not durable from now on.
        """
        there = {s.name: s for s in self._stored().values()}
        planned: dict[str, tuple[Snapshot, Stored]] = {}
        now = time.time()
        for n, s in enumerate(snapshots):
            planned[self.path(s).stem] = s, self._plan(s, [p for p, _ in planned.values()], now + n * 1e-6)
        stay = kept({**{name: stored for name, (_, stored) in planned.items()}, **there}.values(), budget_bytes)
        for name, (s, _) in planned.items():
            s.durable = name in stay or name in there
        return sorted(((s, o.used) for s, o in planned.values() if s.durable), key=lambda found: found[0].offset)

    def path(self, s: Snapshot) -> Path:
        """Where a snapshot's manifest is."""
        return self._files.manifest(s.offset, hashlib.sha256(s.tokens.tobytes()).hexdigest())

    def has(self, block: Block) -> bool:
        """Whether a block is written."""
        return block.blob is not None and self._files.has_blob(block.blob)

    def _stored(self) -> dict[Path, Stored]:
        return {
            path: Stored(path.stem, m["parent"], m["offset"], m["kind"], path.stat().st_mtime, m["sizes"])
            for path, m in self._manifests()
        }

    def _plan(self, s: Snapshot, others: Iterable[Snapshot], used: float) -> Stored:
        """What a snapshot will be on disk; nothing is computed for that, as MLX knows sizes before."""
        name = self.path(s).stem
        sizes: dict[Hashable, int] = {name: _bytes(pack_rest(s, self._kv_bits)[0])}
        for b in s.blocks:
            if self.has(b):
                sizes[b.blob] = blob_path(self._files.blobs, str(b.blob)).stat().st_size
            else:
                sizes[id(b)] = _bytes(pack_block(b, s.form, self._kv_bits)[0])
        before = [
            self.path(p) for p in others if p.offset < s.offset and np.array_equal(p.tokens, s.tokens[: p.offset])
        ]
        parent = max((path.stem for path in [*before, *self._prefixes(s.tokens[:-1])[:1]]), default=None)
        return Stored(name, parent, s.offset, s.kind, used, sizes)


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(a.nbytes + HEADER_BYTES for a in arrays.values())
