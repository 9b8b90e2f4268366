"""Gives memory back while macOS is short of it: snapshots first, then MLX's buffers; never a running answer."""

from __future__ import annotations

import math
import time
import warnings

import mlx.core as mx

from ring_mlx.engine.snapshots import SnapshotTree
from ring_mlx.system import macos

LOOK_S, IDLE_LOOK_S = 1.0, 5.0


class Watch:
    """Asks macOS between steps, on the thread that owns the snapshots.

    At a warning half of the snapshots' bytes go, least useful snapshots first. When memory is critical, all go that no
    running prompt uses. Those of a draft model (``spare``) all go at a warning. The budget stays that small until all is normal again. Snapshots on disk stay.
    """

    def __init__(self, tree: SnapshotTree, spare: SnapshotTree | None = None) -> None:
        self._tree, self._spare, self._next = tree, spare, 0.0
        self._most_bytes: int | None = None
        self._dropped, self._told = 0, False

    @property
    def idle_s(self) -> float | None:
        """How long to wait for work before the next `look`; None where the system cannot be asked."""
        return IDLE_LOOK_S if self._next < math.inf else None

    def look(self) -> None:
        """Ask, at most once a second, and drop snapshots if needed."""
        now = time.monotonic()
        if now < self._next:
            return
        level = macos.memory_pressure()
        self._next = math.inf if level is None else now + LOOK_S
        if level is None or level < macos.WARNING:
            if self._most_bytes is not None:
                self._most_bytes = None
                self._tree.squeeze(None)
                if self._spare is not None:
                    self._spare.squeeze(None)
            return
        if self._spare is not None:
            self._spare.squeeze(0)
        if level >= macos.CRITICAL:
            self._most_bytes = 0
        elif self._most_bytes is None:
            self._most_bytes = self._tree.nbytes // 2
        before = len(self._tree)
        self._tree.squeeze(self._most_bytes)
        self._dropped += before - len(self._tree)
        mx.clear_cache()  # MLX would keep the freed memory for reuse

    def tell(self) -> None:
        """Warn once that snapshots were dropped."""
        if self._dropped and not self._told:
            self._told = True
            warnings.warn(
                f"[memory] macOS is short of memory, so {self._dropped} snapshots were dropped and conversations may be "
                "read again; close other programs, or give less with --cache-memory.",
                stacklevel=2,
            )
