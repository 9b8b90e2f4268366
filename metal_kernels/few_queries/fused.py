"""Softmax attention of a few queries in one dispatch, or two for many keys; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import FLOATS, PACKS, bits
from metal_kernels.few_queries.naive import Queries
from metal_kernels.launch import Kernel, positions
from metal_kernels.packed import THREADGROUP_BYTES, padded
from metal_kernels.recorded import NoKernelError

HERE = Path(__file__).parent
INPUTS = ("q", "k", "v", "offset", "start")
KERNEL = Kernel(HERE / "few_queries.metal", INPUTS, ("o",), PACKS)
MERGE = Kernel(HERE / "merge_splits.metal", ("parts",), ("o",))
MAX_QUERIES = 8
MOST_SIMDGROUPS = 12  # 384 threads, which every pipeline of an Apple GPU may have
MERGING = 4  # simdgroups of a threadgroup that merges

# Keys and values that are not split: a threadgroup then has one head of q and goes through all keys, which for so few come
# from a cache, and there is nothing to merge.
UNSPLIT_KEYS = 1024
# Queries, of all heads that share keys, for which a lane has D / 32 sums each in registers: 16 of them are 64 registers for
# mini, half of what an Apple GPU has for a thread in full.
MOST_ROWS = {"metal": 8, "cuda": 16}
# Threadgroups that keep all cores busy: two for each of 132 SMs, or of 40 cores.
ENOUGH_THREADGROUPS = {"metal": 80, "cuda": 264}
TILE = 32  # keys of a simdgroup at a time


def fused_few_queries(*arguments: Any) -> mx.array:
    """Same contract as `naive_few_queries`, in one dispatch, or two where there is room for more than 1,024 keys.

    Raises NoKernelError unless there are 1 to 8 queries and heads of a multiple of 32 up to 256.
    """
    q, k, v, offset, scale, start = Queries(*arguments)
    (B, HQ, T, D), (_, HKV, L, _), offset = q.shape, k.shape, positions(offset)
    is_known = q.dtype in FLOATS and k.dtype == v.dtype and k.dtype in FLOATS and offset.shape in ((1,), (B,))
    is_known = is_known and 1 <= T <= MAX_QUERIES and D in range(32, 257, 32) and k.shape == v.shape == (B, HKV, L, D)
    is_known = is_known and L >= T and HKV >= 1 and HQ % HKV == 0
    if not is_known or (start is not None and (start.shape, start.dtype) != ((B,), mx.int32)):
        raise NoKernelError(f"[few_queries] no kernel for q {q.shape} {q.dtype} and keys {k.shape} {k.dtype}.")
    heads, simdgroups, splits = _cut(B, HQ, HQ // HKV, T, D, L)
    common = (("N", T), ("HQ", HQ), ("D", D))
    whole, parts = (B, T, HQ * D), (B, HQ, T, splits, D + 2)
    made = q.dtype if splits == 1 else mx.float32
    (o,) = KERNEL.launch(
        [q, k, v, offset, offset if start is None else start],
        template=[
            *(*common, ("HKV", HKV), ("C", k.dtype), ("O", made), ("HEADS", heads)),
            *(("SIMDGROUPS", simdgroups), ("GROUPS", 2 if heads * T > 4 or D > 128 else 4), ("WHOLE", splits == 1)),
            *(("HAS_START", start is not None), ("PER_ROW", offset.shape[0] > 1)),
            ("SCALE", bits(scale * math.log2(math.e))),
        ],
        grid=(splits * simdgroups * 32, HQ // heads, B),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[whole if splits == 1 else parts],
        dtypes=[made],
    )
    if splits == 1:
        return o
    (o,) = MERGE.launch(
        [o],
        template=[*common, ("T", q.dtype), ("SIMDGROUPS", MERGING)],
        grid=(B * HQ * T * MERGING * 32, 1, 1),
        threadgroup=(MERGING * 32, 1, 1),
        shapes=[whole],
        dtypes=[q.dtype],
    )
    return o


def _cut(B: int, HQ: int, shared: int, T: int, D: int, L: int) -> tuple[int, int, int]:
    """Heads of q and simdgroups of a threadgroup, and parts of the keys."""
    where = choices.where()
    if L <= UNSPLIT_KEYS:
        return 1, _simdgroups(T, D, MOST_SIMDGROUPS), 1
    most = max(T, _of(MOST_ROWS, where) * 128 // max(128, D))
    heads = max(n for n in range(1, shared + 1) if shared % n == 0 and n * T <= most)
    simdgroups = _simdgroups(heads * T, D, 8)
    enough = -(-_of(ENOUGH_THREADGROUPS, where) * heads // (B * HQ))
    return heads, simdgroups, max(2, min(enough, -(-L // (TILE * simdgroups))))


def _simdgroups(rows: int, D: int, most: int) -> int:
    """As many as threadgroup memory allows."""
    filled = -(-rows // 4) * 4
    own = max(filled * 36, (2 if D > 128 else 4) * D)
    return next(
        n
        for n in range(most, 0, -1)
        if padded(4 * filled * D, 4 * n * own, 8 * n * rows, 8 * rows) <= THREADGROUP_BYTES
    )


def _of(table: dict[str, int], where: str) -> int:
    return table.get(where, table["metal"])
