"""A pool of expert slots in memory: finds an expert or reads it, and evicts another.

Reads fill slots while MLX computes with others. Whatever is computed with slots is started at once, and waited for
before those slots are filled again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait

import mlx.core as mx

from ring_mlx.experts.layout import LayerPlaces
from ring_mlx.experts.policies import LFU
from ring_mlx.experts.reader import ExpertReader
from ring_mlx.experts.slots import Slots
from ring_mlx.experts.statistics import Counts

Key = tuple[int, int]
# Takes the slots of some experts by expert.
Compute = Callable[[Mapping[int, int]], mx.array]
Reading = dict[Key, tuple[int, list[object], Future[int]]]


class Pool:
    """Slots for layers whose experts have the same parts; unless ``is_kept``, they are emptied after each layer."""

    def __init__(
        self, layers: Mapping[int, LayerPlaces], slots: Slots, reader: ExpertReader, is_kept: bool = True
    ) -> None:
        self.slots, self.lfu = slots, LFU()
        self._layers, self._reader, self._is_kept = layers, reader, is_kept
        self._held: dict[Key, int] = {}
        self._free = list(range(slots.count))
        self._busy: deque[tuple[set[Key], mx.array]] = deque()
        self._reading: Reading = {}

    def run(self, layer: int, needed: Sequence[int], compute: Compute, counts: Counts, at_once: bool) -> list[mx.array]:
        """Compute with the experts that a layer needs, those in memory first, while the others are read.

        ``compute`` is called with some of them at a time, or if ``at_once`` and they fit, with all. Returns what each
        call returned, already begun. Raises a WeightsError if an expert cannot be read.
        """
        self._settle()
        held = {e: self._held[layer, e] for e in needed if (layer, e) in self._held}
        missing = [e for e in needed if e not in held]
        counts.lookups += len(needed)
        counts.hits += len(held)
        for e in held:
            self.lfu.touch((layer, e))
        if len(needed) <= self.slots.count:
            reading = self._start(layer, missing, {(layer, e) for e in held})
            if at_once:
                held |= self._finish(reading, counts)
                missing = []
            out = [self._begin(layer, held, compute)] if held else []
            if missing:
                out.append(self._begin(layer, self._finish(reading, counts), compute))
        else:
            out, size = [self._begin(layer, held, compute)] if held else [], max(1, self.slots.count // 2)
            for i in range(0, len(missing), size):
                reading = self._start(layer, missing[i : i + size], set())
                out.append(self._begin(layer, self._finish(reading, counts), compute))
        if not self._is_kept:
            for key in list(self._held):
                self._drop(key)
        return out

    def _begin(self, layer: int, slots: Mapping[int, int], compute: Compute) -> mx.array:
        y = compute(slots)
        mx.async_eval(y)
        self._busy.append(({(layer, e) for e in slots}, y))
        return y

    def _settle(self) -> None:
        """Wait for all that was begun, and free the slots of reads that failed or were interrupted."""
        while self._busy:
            mx.eval(self._busy.popleft()[1])
        wait([future for _, _, future in self._reading.values()])
        self._free += [slot for slot, _, _ in self._reading.values()]
        self._reading = {}

    def _start(self, layer: int, experts: Sequence[int], pinned: set[Key]) -> Reading:
        """Begin to read experts into free slots."""
        places = self._layers[layer].experts
        reading = self._reading = Reading()
        for e in experts:
            slot = self._take(pinned)
            buffers = self.slots.buffers(slot)
            what = f"expert {e} of layer {layer}"
            reading[layer, e] = slot, buffers, self._reader.submit(what, places[e], buffers)
        return reading

    def _take(self, pinned: set[Key]) -> int:
        """A slot that nothing computes with, of an expert that is not pinned."""
        while not self._free:
            taken = pinned.union(*(keys for keys, _ in self._busy))
            if any(key not in taken for key in self._held):
                self._drop(self.lfu.victim(taken))  # type: ignore[arg-type]
            else:
                mx.eval(self._busy.popleft()[1])
        return self._free.pop()

    def _finish(self, reading: Reading, counts: Counts) -> dict[int, int]:
        """Wait for reads; returns the slots of their experts."""
        started = time.perf_counter()
        wait([future for _, _, future in reading.values()])
        counts.wait_s += time.perf_counter() - started
        failed = [future.exception() for _, _, future in reading.values()]
        error = next((e for e in failed if e is not None), None)
        if error is not None:
            raise error
        self._reading = {}
        for key, (slot, buffers, future) in reading.items():
            self.slots.settle(slot, buffers)
            self._held[key] = slot
            self.lfu.touch(key)
            counts.bytes_read += future.result()
        return {e: slot for (_, e), (slot, _, _) in reading.items()}

    def _drop(self, key: Key) -> None:
        self._free.append(self._held.pop(key))
        self.lfu.forget(key)
