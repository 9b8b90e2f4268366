"""A pool of expert slots in memory: finds an expert or reads it, and evicts another.

Reads fill slots while MLX computes with others. A slot is filled again only once nothing that was begun with it is still
to be computed: whatever is computed with slots is started at once, and waited for before they may be reused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait

import mlx.core as mx

from ring_mlx.experts.layout import LayerPlaces
from ring_mlx.experts.policies import Policy
from ring_mlx.experts.reader import Reader
from ring_mlx.experts.slots import Slots
from ring_mlx.experts.statistics import Counts

Key = tuple[int, int]
# From the slots of some experts, by expert, to what is computed with them.
Compute = Callable[[Mapping[int, int]], mx.array]
Reading = dict[Key, tuple[int, list[object], Future[int]]]


class Pool:
    """The slots of layers whose experts are alike.

    Args:
        layers: Where their experts lie, by layer.
        slots: Memory for some of them.
        reader: Of the files.
        policy: Who makes room.
    """

    def __init__(self, layers: Mapping[int, LayerPlaces], slots: Slots, reader: Reader, policy: Policy) -> None:
        self.slots, self.policy = slots, policy
        self._layers, self._reader = layers, reader
        self._held: dict[Key, int] = {}
        self._free = list(range(slots.count))
        self._busy: deque[tuple[set[Key], mx.array]] = deque()
        self._reading: Reading = {}

    def run(self, layer: int, needed: Sequence[int], compute: Compute, counts: Counts, at_once: bool) -> list[mx.array]:
        """Compute with experts of a layer, those in memory first, while the others are read.

        Args:
            layer: Whose.
            needed: Experts, each once.
            compute: Called with a part of them at a time; every expert is in one part.
            counts: Where to count.
            at_once: Call it once, with all of them, if the slots suffice.

        Returns:
            What each call returned; already begun.

        Raises:
            WeightsError: If an expert cannot be read.
        """
        self._settle()
        held = {e: self._held[layer, e] for e in needed if (layer, e) in self._held}
        missing = [e for e in needed if e not in held]
        counts.lookups += len(needed)
        counts.hits += len(held)
        for e in held:
            self.policy.touch((layer, e))
        pinned = {(layer, e) for e in held}
        fits = len(needed) <= self.slots.count
        size = len(missing) if fits else max(1, self.slots.count // 2)
        chunks = [missing[i : i + size] for i in range(0, len(missing), max(1, size))]
        reading = self._start(layer, chunks[0], pinned) if fits and chunks else None
        out = []
        if at_once and fits:
            if reading is not None:
                held |= self._finish(reading, counts)
            return self._end([self._begin(layer, held, compute)])
        if held:
            out.append(self._begin(layer, held, compute))
        for chunk in chunks:
            reading = reading or self._start(layer, chunk, set())
            out.append(self._begin(layer, self._finish(reading, counts), compute))
            reading = None
        return self._end(out)

    def _begin(self, layer: int, slots: Mapping[int, int], compute: Compute) -> mx.array:
        y = compute(slots)
        mx.async_eval(y)
        self._busy.append(({(layer, e) for e in slots}, y))
        return y

    def _end(self, out: list[mx.array]) -> list[mx.array]:
        if not self.policy.retains:
            for key in list(self._held):
                self._drop(key)
        return out

    def _settle(self) -> None:
        """Wait for all that was begun; the slots of reads that failed or were interrupted are free again."""
        while self._busy:
            mx.eval(self._busy.popleft()[1])
        wait([future for _, _, future in self._reading.values()])
        self._free += [slot for slot, _, _ in self._reading.values()]
        self._reading = {}

    def _start(self, layer: int, experts: Sequence[int], pinned: set[Key]) -> Reading:
        """Begin to read experts into slots that nothing uses."""
        places = self._layers[layer].experts
        reading = self._reading = Reading()
        for e in experts:
            slot = self._take(pinned)
            buffers = self.slots.buffers(slot)
            what = f"expert {e} of layer {layer}"
            reading[layer, e] = slot, buffers, self._reader.submit(what, places[e], buffers)
        return reading

    def _take(self, pinned: set[Key]) -> int:
        """A slot that nothing uses and that will not be needed."""
        while not self._free:
            taken = pinned.union(*(keys for keys, _ in self._busy))
            if any(key not in taken for key in self._held):
                self._drop(self.policy.victim(taken))  # type: ignore[arg-type]
            else:
                mx.eval(self._busy.popleft()[1])
        return self._free.pop()

    def _finish(self, reading: Reading, counts: Counts) -> dict[int, int]:
        """Wait for reads; the slots of their experts."""
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
            self.policy.touch(key)
            counts.bytes_read += future.result()
        return {e: slot for (_, e), (slot, _, _) in reading.items()}

    def _drop(self, key: Key) -> None:
        self._free.append(self._held.pop(key))
        self.policy.forget(key)
