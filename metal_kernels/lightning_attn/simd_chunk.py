"""Lightning attention over many tokens as one chunked kernel, or two where time is split; checks shapes and launches."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from metal_kernels import choices, launch
from metal_kernels.constants import FLOATS, absent, bits, ints
from metal_kernels.launch import Kernel
from metal_kernels.recorded import run

HERE = Path(__file__).parent
KERNEL = Kernel(
    HERE / "simd_chunk.metal",
    ("q", "k", "v", "decay_rate", "sizes", "state", "mask", "updates", "update_counts"),
    ("o", "new_state"),
    (HERE / "chunk_tiles.metal",),
)
SEGMENT_STATES = Kernel(
    HERE / "segment_states.metal",
    ("k", "v", "decay_rate", "sizes", "mask"),
    ("updates", "update_counts"),
    (HERE / "chunk_tiles.metal",),
)
MIN_SEGMENT_TOKENS = 256
MAX_SEGMENTS = 16


class Tuning(NamedTuple):
    """What differs by backend. Not timed on Apple hardware; the README gives the reasoning.

    Attributes:
        narrow: Dtypes whose products take operands of that dtype, in ``PARTS`` where inexact; others take float.
        threadgroups: How many keep the GPU busy; with fewer, time is split into segments.
    """

    narrow: tuple[mx.Dtype, ...]
    threadgroups: int


TUNING = {"metal": Tuning((), 64), "cuda": Tuning((mx.bfloat16,), 264), "simulator": Tuning((), 1)}
PARTS = {mx.float32: 1, mx.bfloat16: 3}


def supports(q: mx.array, k: mx.array, v: mx.array, decay_rate: mx.array) -> bool:
    """Whether `simd_chunk_lightning_attn` runs these: some tokens, one dtype, K and V multiples of 32, K at most 256."""
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or q.size == 0 or v.size == 0:
        return False
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype or decay_rate.dtype != mx.float32:
        return False
    K, V = q.shape[-1], v.shape[-1]
    return K % 32 == 0 and V % 32 == 0 and K <= 256 and decay_rate.shape == (q.shape[2],)


def simd_chunk_lightning_attn(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    segments: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_lightning_attn`, for what `supports` says.

    The kernel reads q, k and v as [B, H, T, D]: transposed views of such arrays, which `qk_norm_rope` makes, cost no
    copy. ``segments`` overrides into how many parts time is split. Raises ValueError if `supports` says no, or the
    state or the mask has another shape or dtype.
    """
    if not supports(q, k, v, decay_rate):
        raise ValueError(f"[simd_chunk_lightning_attn] no kernel for q {q.shape}, v {v.shape} and {q.dtype}.")
    B, T, H, K = q.shape
    V = v.shape[-1]
    if state is not None and (state.shape != (B, H, K, V) or state.dtype != mx.float32):
        raise ValueError(f"[simd_chunk_lightning_attn] state must be {(B, H, K, V)} float32 but got {state.shape}.")
    if mask is not None and (mask.shape != (B, T) or mask.dtype != mx.bool_):
        raise ValueError(f"[simd_chunk_lightning_attn] mask must be {(B, T)} bool but got {mask.shape} {mask.dtype}.")
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    o, new_state = run(_launch, q, k, v, decay_rate, scale, state, mask, segments)
    return o, new_state


def chunk_tokens(K: int, dtype: mx.Dtype) -> int:
    """Tokens of a chunk: q and k of one take at most 8 KB each of the threadgroup memory, and padding."""
    return next(C for C in (32, 16, 8) if C * K * dtype.size <= 8192)


def split_columns(K: int, V: int) -> tuple[int, int]:
    """Simdgroups of a threadgroup, and 8-column tiles of each: K * TILES / 4 floats of state a lane stay under 64."""
    tiles = 2 if K <= 128 else 1
    return next(n for n in (4, 2, 1) if V % (n * tiles * 8) == 0), tiles


def tokens_of_a_segment(T: int, chunk: int, threadgroups: int, enough: int, segments: int | None = None) -> int:
    """Whole chunks, so that as many segments as given fill the GPU, or as it needs, of 256 tokens or more each."""
    if segments is None:
        if choices.variant("lightning_attn", T) == choices.UNSPLIT:
            enough = 1
        enough = choices.scaled(enough, "lightning_attn", T)
        segments = 1
        if threadgroups < enough:
            segments = max(1, min(-(-enough // threadgroups), T // max(chunk, MIN_SEGMENT_TOKENS), MAX_SEGMENTS))
    return -(-T // (segments * chunk)) * chunk


def _launch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay_rate: mx.array,
    scale: float,
    state: mx.array | None,
    mask: mx.array | None,
    segments: int | None,
) -> list[mx.array]:
    """One pass for q, k [B, H, T, K] and v [B, H, T, V], or two where time is split."""
    (B, H, T, K), V, dtype = q.shape, v.shape[-1], q.dtype
    where = launch.backend()
    tuning, C = TUNING["metal" if where is None else where.name], chunk_tokens(K, dtype)
    simdgroups, tiles = split_columns(K, V)
    threadgroups = B * H * V // (simdgroups * tiles * 8)
    segment_tokens = tokens_of_a_segment(T, C, threadgroups, tuning.threadgroups, segments)
    count = -(-T // segment_tokens)
    operand = dtype if dtype in tuning.narrow else mx.float32
    template = [
        *(("T", dtype), ("M", operand), ("PARTS", PARTS[operand]), ("BLOCK", 2 if dtype in tuning.narrow else 1)),
        *(("K", K), ("V", V), ("C", C), ("SIMDGROUPS", simdgroups), ("TILES", tiles), ("HAS_MASK", mask is not None)),
    ]
    flags, sizes = absent(mx.bool_) if mask is None else mask, ints(segment_tokens)
    updates = [absent(mx.float32), absent(mx.int32)]
    if count > 1:
        updates = SEGMENT_STATES.launch(
            [k, v, decay_rate, sizes, flags],
            template=template,
            grid=(threadgroups * simdgroups * 32, count - 1, 1),
            threadgroup=(simdgroups * 32, 1, 1),
            shapes=[(B, H, count - 1, K, V), (B, H, count - 1)],
            dtypes=[mx.float32, mx.int32],
        )
    return KERNEL.launch(
        [q, k, v, decay_rate, sizes, absent(mx.float32) if state is None else state, flags, *updates],
        template=[*template, ("SCALE", bits(scale)), ("HAS_STATE", state is not None), ("SEGMENTED", count > 1)],
        grid=(threadgroups * simdgroups * 32, count, 1),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[(B, T, H, V), (B, H, K, V)],
        dtypes=[dtype, mx.float32],
    )
