"""The mixture of experts whose experts are read on demand, and a model made to use it.

A layer needs to know what its router chose, so it waits once for the GPU, where a model in memory waits once a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.core import array

from metal_kernels import launch, moe_kernel
from ring_mlx.errors import OptionError
from ring_mlx.experts.layout import LayerPlaces, find_experts
from ring_mlx.experts.policies import POLICIES
from ring_mlx.experts.pool import Pool
from ring_mlx.experts.reader import ExpertReader
from ring_mlx.experts.slots import Slots, slot_bytes
from ring_mlx.experts.statistics import ExpertStatistics
from ring_mlx.model.kernel_weights import KernelExperts
from ring_mlx.model.model import Model
from ring_mlx.model.moe import MoE

ROUTED = ".mlp.switch_mlp."
# From so many pairs of token and expert, mlx-lm's experts sort them.
SORTED_FROM_PAIRS = 64
# With --expert-policy none: room for a part of a prefill.
UNKEPT_SLOTS = 32


class StreamedMoE(MoE):
    """Same contract as `MoE`; the stacks of ``switch_mlp`` are slots, whose experts change from call to call."""

    is_streamed = True

    def __init__(self, moe: MoE, layer: int, pool: Pool, statistics: ExpertStatistics, is_first: bool) -> None:
        super(MoE, self).__init__()
        self.gate, self.switch_mlp = moe.gate, moe.switch_mlp
        if "shared_experts" in moe:
            self.shared_experts = moe.shared_experts
        self._packed = KernelExperts()
        self._layer, self._pool, self._statistics, self._is_first = layer, pool, statistics, is_first
        self._table = np.full(moe.switch_mlp.gate_proj.num_experts, -1, np.int32)

    def __call__(
        self, x: array, dtype: mx.Dtype | None = None, residual: array | None = None, logits: array | None = None
    ) -> array:
        """As `MoE.__call__`; waits for the router and for reads, and raises a WeightsError if one fails."""
        chosen, weights = self.gate(x) if logits is None else self.gate.choose(logits)
        x = x if dtype is None else x.astype(dtype)
        flat, top_k = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
        chosen, weights = chosen.reshape(-1, top_k), weights.reshape(-1, top_k)
        mx.eval(chosen, weights, flat)
        counts = self._statistics.decode if x.shape[-2] == 1 else self._statistics.prefill
        if self._is_first:
            counts.tokens += flat.shape[0]
            self._pool.lfu.advance()
        experts = np.asarray(chosen)
        needed = np.unique(experts).tolist()
        packed = None if launch.backend() is None or len(needed) > self._pool.slots.count else self.weights()
        kernel = None if packed is None else moe_kernel(packed, flat)
        if packed is not None and kernel is not None:
            added = None if residual is None else residual.reshape(flat.shape)

            def run(slots: Mapping[int, int]) -> array:
                local = mx.array(self._local(experts, slots))
                y = kernel(flat, local, weights, packed, added)
                return self._by_products(flat, local, weights, added) if y is None else y

            return self._pool.run(self._layer, needed, run, counts, at_once=True)[0].reshape(x.shape)
        shared = self.shared_experts(x).astype(mx.float32) if "shared_experts" in self else None
        if shared is not None:
            mx.async_eval(shared)
        y = (self._routed(flat, experts, needed, counts).astype(mx.float32) * weights[..., None]).sum(axis=-2)
        y = y.reshape(x.shape)
        if shared is not None:
            y = y + shared
        return y if residual is None else (residual.astype(mx.float32) + y).astype(residual.dtype)

    def _routed(self, x: array, chosen: Any, needed: list[int], counts: Any) -> array:
        """The output of each chosen expert, [T, k, hidden], for x [T, hidden]."""
        is_sorted, positions = chosen.size >= SORTED_FROM_PAIRS, []
        flat = chosen.reshape(-1)

        def part(slots: Mapping[int, int]) -> array:
            local = self._local(flat, slots)
            found = np.flatnonzero(local >= 0)
            if is_sorted:
                found = found[np.argsort(local[found], kind="stable")]
            positions.append(found)
            return self._pairs(x[mx.array(found // chosen.shape[-1])], mx.array(local[found]), is_sorted)

        parts = self._pool.run(self._layer, needed, part, counts, at_once=False)
        order = np.empty(flat.size, np.int32)
        order[np.concatenate(positions)] = np.arange(flat.size, dtype=np.int32)
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return y[mx.array(order)].reshape(*chosen.shape, -1)

    def _pairs(self, x: array, slots: array, is_sorted: bool) -> array:
        """Each row of x [n, hidden] through the expert in its slot [n]: the operations of mlx-lm's SwitchGLU."""
        mlp, x = self.switch_mlp, x[:, None]
        up, gate = mlp.up_proj(x, slots, is_sorted), mlp.gate_proj(x, slots, is_sorted)
        return mlp.down_proj(mlp.activation(up, gate), slots, is_sorted)[:, 0]

    def _local(self, experts: Any, slots: Mapping[int, int]) -> Any:
        """Numbers of slots for numbers of experts; -1 where there is none."""
        table = self._table
        table[:] = -1
        table[list(slots)] = list(slots.values())
        return table[experts]


def attach(
    model: Model, folder: Path, cache_bytes: int, dtype: mx.Dtype, policy: str | None = None
) -> ExpertStatistics:
    """Make a model with unread weights read its routed experts on demand; returns its counts.

    Args:
        model: Changed in place: its routed experts are dropped, and ``expert_statistics`` added.
        folder: The checkpoint that it was loaded from, whose files stay open.
        cache_bytes: The most that slots take.
        dtype: What floats become.
        policy: One of `POLICIES`: "lfu" (if None) keeps experts by use, "none" keeps nothing between layers.

    Raises:
        OptionError: If the policy is unknown or the memory too small for one token.
        WeightsError: If the files cannot be read.
    """
    policy = policy or POLICIES[0]
    if policy not in POLICIES:
        raise OptionError(f"--expert-policy {policy!r} is not one of {', '.join(POLICIES)}; choose one.")
    layers = find_experts(folder, model.config)
    kinds: dict[Any, dict[int, LayerPlaces]] = {}
    for i, places in layers.items():
        kinds.setdefault(places.parts, {})[i] = places
    counts = _slot_counts(kinds, cache_bytes, dtype, model.config.num_experts_per_tok)
    if policy == "none":
        counts = [min(n, max(UNKEPT_SLOTS, model.config.num_experts_per_tok)) for n in counts]
    files = {p.file for places in layers.values() for e in places.experts for p in e.pieces}
    reader = ExpertReader(sorted(files))
    taken = sum(n * slot_bytes(parts, dtype) for n, parts in zip(counts, kinds, strict=True))
    statistics = ExpertStatistics(policy, sum(counts), taken)
    for (parts, members), count in zip(kinds.items(), counts, strict=True):
        pool = Pool(members, Slots(parts, count, dtype), reader, policy != "none")
        for i in members:
            streamed = StreamedMoE(model.layers[i].mlp, i, pool, statistics, i == min(layers))
            for name, stack in pool.slots.arrays.items():
                module, _, attribute = name.partition(".")
                streamed.switch_mlp[module][attribute] = stack
            streamed.eval()
            model.layers[i].mlp = streamed
    model.expert_statistics = statistics
    return statistics


def needed_bytes(arrays: Mapping[str, array], cache_bytes: int) -> int:
    """Bytes of the weights that stay in memory, and of the slots."""
    return cache_bytes + sum(a.nbytes for name, a in arrays.items() if ROUTED not in name)


def _slot_counts(
    kinds: Mapping[Any, Mapping[int, LayerPlaces]], cache_bytes: int, dtype: mx.Dtype, top_k: int
) -> list[int]:
    """Divide slots among expert kinds in proportion to their size, at least ``top_k`` each."""
    sizes = [slot_bytes(parts, dtype) for parts in kinds]
    numbers = [sum(len(p.experts) for p in members.values()) for members in kinds.values()]
    least, whole = top_k * sum(sizes), sum(s * n for s, n in zip(sizes, numbers, strict=True))
    if cache_bytes < least:
        raise OptionError(
            f"--expert-cache-bytes {cache_bytes} is too little for the {top_k} experts of a token; give at least {least}."
        )
    spare = cache_bytes - least
    return [min(n, top_k + spare * (s * n) // whole // s) for s, n in zip(sizes, numbers, strict=True)]
