"""How the kernels cut their work, per backend: the one table of sizes, with the reasons."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from metal_kernels import choices


class Rows(NamedTuple):
    """Decode: rows of a simdgroup in either kernel, and simdgroups of a threadgroup in the first.

    ``is_down_together``: whether a threadgroup of the second has all tokens, so that each expert is read once for them.
    """

    gate_up: int
    simdgroups: int
    down: int
    is_down_together: bool


class Tile(NamedTuple):
    """Prefill: a threadgroup computes ``rows`` tokens x 64 columns, of which each simdgroup has an equal rectangle."""

    rows: int
    simd_rows: int
    simd_columns: int


# Each row costs a lane two 16-byte loads (gate and up) a step against four for x, which the cache serves: more rows
# save instructions, fewer make more threadgroups. Ring-mini at one token has 9 x 512 rows in the first kernel: 288
# threadgroups at 4 rows, 7 for each of 40 cores; at 2 rows 576, or 17 warps for each of 132 SMs, with 35 KB of loads in
# flight on each. The second kernel has 9 simdgroups a threadgroup and 256 threadgroups at 4 rows on either.
# "metal" is chosen by these counts; nobody could time it on Apple hardware. On an H200 the second kernel takes 23 us for four
# tokens together and 12 one by one, of which the 50 MB of cache serve what they share; a Mac's cache is smaller.
DECODE = {"metal": Rows(4, 4, 4, True), "cuda": Rows(2, 4, 4, False)}

# What a simdgroup_matrix multiplies. On Apple's GPUs float products are taken to be as fast as half ones, and older
# chips have no bfloat arithmetic, so bfloat16 goes through float there: weights are then exact, at twice the traffic in
# threadgroup memory. Tensor cores want 16 bits. "metal" rests on this reasoning; nobody could time it on Apple hardware.
OPERANDS = {
    "metal": {mx.float32: mx.float32, mx.bfloat16: mx.float32, mx.float16: mx.float16},
    "cuda": {mx.float32: mx.float32, mx.bfloat16: mx.bfloat16, mx.float16: mx.float16},
}

# All tiles have 4 simdgroups and 64 columns (32 of gate and 32 of up in the first kernel), and are 128 bytes deep: one
# 32-value block of weights a thread. At 64 rows a simdgroup has 32 x 32 sums (32 registers a lane) and loads 8 matrices
# for 16 products, with 18 KB of threadgroup memory. Fewer rows where an expert has fewer, as on short prompts: a
# product with an empty row is as slow as any other. Not timed on Apple hardware.
COLUMNS = 64
DEPTH_BYTES = 128
TILES = (Tile(16, 1, 4), Tile(32, 1, 4), Tile(64, 2, 2))


def decode_rows(backend: str, tokens: int) -> Rows:
    """Sizes of the decode kernels: the table's, or half or twice the rows of either kernel as chosen."""
    rows = DECODE.get(backend, DECODE["metal"])
    scale, _, which = str(choices.variant("experts", tokens)).partition(" ")
    if not which:
        return rows
    first, second = (choices.SCALES[scale], 1.0) if which == "first" else (1.0, choices.SCALES[scale])
    gate_up, down = max(1, int(rows.gate_up * first)), max(1, int(rows.down * second))
    return rows._replace(gate_up=gate_up, down=down)


def operand(backend: str, dtype: mx.Dtype) -> mx.Dtype:
    """Type of the matrices that prefill multiplies, for activations of ``dtype``."""
    return OPERANDS.get(backend, OPERANDS["metal"])[dtype]


def prefill_tile(rows_per_expert: float, tokens: int) -> Tile:
    """The smallest tile that takes most experts' rows at once, for the mean number of rows; or one smaller or larger."""
    rows_per_expert *= choices.SCALES.get(str(choices.variant("experts", tokens)), 1.0)
    return TILES[0] if rows_per_expert < 12 else TILES[1] if rows_per_expert < 40 else TILES[2]
