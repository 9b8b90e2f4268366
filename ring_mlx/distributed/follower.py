"""A rank other than 0 of a server: it does the steps that rank 0 orders.

The orders are those of `ring_mlx.distributed.leader`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ring_mlx.distributed.leader import READER, SharedBatch, common_budget
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.scheduler import CLEAR_EVERY_STEPS
from ring_mlx.engine.snapshots import Snapshot, SnapshotTree
from ring_mlx.system.wired import Wired

if TYPE_CHECKING:
    from ring_mlx.distributed.group import Channel


class Follower:
    """This rank's part of the model, with the same options as on rank 0, and of rank 0's caches."""

    def __init__(self, loaded: LoadedModel, group: mx.distributed.Group) -> None:
        self._loaded = loaded
        common_budget(loaded.budget_bytes(), loaded.model, group)
        self._kept = _Kept()
        self._readers: dict[int, PromptReader] = {}
        self._reading: dict[int, Iterator[int]] = {}
        self._batch = SharedBatch(loaded.model, loaded.options.prefill_step_tokens, group)
        self._steps, self._wired = 0, Wired()

    def run(self, channel: Channel) -> None:
        """Do rank 0's orders until it closes. Raises OSError if rank 0 is gone; RuntimeError if another rank is."""
        while (order := channel.receive())["do"] != "close":
            for kind, number in order["gone"]:
                (self._close if kind == READER else self._kept.drop)(number)
            self._wired.hold()
            self._do(order, channel)
            if not self._readers and not len(self._batch):
                self._wired.release()

    def _do(self, order: dict[str, Any], channel: Channel) -> None:
        do, number = order["do"], order.get("reader", -1)
        if do == "start":
            self._reader(number).live.restore(self._kept.get(order["snapshot"]))
        elif do == "read":
            points = {int(at): kind for at, kind in order["points"]}
            steps = self._reader(number).read(order["ids"], points, channel.receive, order["step_tokens"])
            self._reading[number] = steps
            next(steps, None)
        elif do == "next":
            next(self._reading[number], None)
        elif do == "add":
            cache = self._reader(number).live.cache
            self._batch.add(order["prompt"], cache=cache, max_tokens=order["max_tokens"])
            self._close(number)
        elif do == "step":
            self._batch.step()
            self._steps += 1
            if self._steps % CLEAR_EVERY_STEPS == 0:
                mx.clear_cache()
        elif do == "remove":
            self._batch.remove(order["row"])

    def _reader(self, number: int) -> PromptReader:
        if number not in self._readers:
            self._readers[number] = self._loaded.reader(self._kept, None)
        return self._readers[number]

    def _close(self, number: int) -> None:
        self._readers.pop(number, None)
        self._reading.pop(number, None)


class _Kept(SnapshotTree):
    """Snapshots by their number in order of adding, until rank 0 drops them."""

    def __init__(self) -> None:
        super().__init__(1)  # of bytes, which are not counted here: rank 0 says what to drop
        self._count = itertools.count()
        self._all: dict[int, Snapshot] = {}

    def add(self, snapshot: Snapshot, holder: object = None, rank: int | None = None) -> Snapshot:
        self._all[next(self._count)] = snapshot
        return snapshot

    def get(self, number: int | None) -> Snapshot | None:
        return None if number is None else self._all[number]

    def drop(self, number: int) -> None:
        del self._all[number]
