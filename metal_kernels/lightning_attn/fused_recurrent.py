"""Lightning attention of a decode step as one kernel, from the fused projection; checks shapes and launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import FLOATS, PACKS, absent, are_norm_weights, bits
from metal_kernels.launch import Kernel, positions
from metal_kernels.lightning_attn.naive import Recurrence
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(
    Path(__file__).with_name("fused_recurrent.metal"),
    ("qkv", "q_weight", "k_weight", "inv_freq", "offset", "decay_rate", "state", "mask"),
    ("o", "new_state"),
    PACKS,
)
MAX_TOKENS = 8
SIMDGROUPS = 8
# A slice of 32 columns is 128 bytes of a row of the state, one cache line; of 16, half of one, but twice as many
# threadgroups: B * H * D / 32 of them below this number leave cores of an H100 idle (132). On Apple's GPUs whole lines go
# first: mini's 64 threadgroups keep as many of 10 to 40 cores busy as 128 would (80 to 100 %), with as many bytes under way.
ENOUGH_THREADGROUPS = {"metal": 1, "cuda": 128}


def fused_qkv_lightning_attn(*arguments: Any) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_qkv_lightning_attn`, in one dispatch.

    Raises NoKernelError unless there are 1 to 8 tokens, heads of a multiple of 32 up to 256, and both norm weights of
    one dtype or neither; ValueError if the state or the mask has another shape or dtype.
    """
    qkv, q_weight, k_weight, inv_freq, rope_scale, offset, decay_rate, scale, eps, state, mask, each = Recurrence(
        *arguments
    )
    (B, T, width), dtype = qkv.shape, qkv.dtype
    H, R, offset = decay_rate.shape[0], 2 * inv_freq.shape[0], positions(offset)
    D = width // (3 * H)
    is_known = dtype in FLOATS and inv_freq.dtype == decay_rate.dtype == mx.float32 and offset.shape in ((1,), (B,))
    is_known = is_known and B >= 1 and 1 <= T <= MAX_TOKENS and width == 3 * H * D and D in range(32, 257, 32)
    if not is_known or not 2 <= R <= D or not are_norm_weights(q_weight, k_weight, D):
        raise NoKernelError(f"[qkv_lightning_attn] no kernel for qkv {qkv.shape} {dtype} and {decay_rate.shape} heads.")
    if state is not None and (state.shape, state.dtype) != ((B, H, D, D), mx.float32):
        raise ValueError(
            f"[qkv_lightning_attn] state must be {(B, H, D, D)} float32 but got {state.shape} {state.dtype}."
        )
    if mask is not None and (mask.shape, mask.dtype) != ((B, T), mx.bool_):
        raise ValueError(f"[qkv_lightning_attn] mask must be {(B, T)} bool but got {mask.shape} {mask.dtype}.")
    columns = columns_of_a_slice(B, H, D, ENOUGH_THREADGROUPS.get(choices.where(), ENOUGH_THREADGROUPS["metal"]))
    if choices.variant("recurrent", T) == choices.OTHER_WIDTH and D % 64 == 0:
        columns = 48 - columns
    none = absent(mx.float32)
    weight = none if q_weight is None else q_weight
    inputs = [qkv, weight, none if k_weight is None else k_weight, inv_freq, offset, decay_rate]
    o, new_state = KERNEL.launch(
        [*inputs, none if state is None else state, offset if mask is None else mask],
        template=[
            *(("T", dtype), ("W", weight.dtype), ("N", T), ("H", H), ("D", D), ("R", R)),
            *(("COLUMNS", columns), ("SIMDGROUPS", SIMDGROUPS), ("NORM", q_weight is not None)),
            *(("HAS_STATE", state is not None), ("HAS_MASK", mask is not None), ("PER_ROW", offset.shape[0] > 1)),
            ("EACH", each),
            *(("SCALE", bits(scale)), ("EPS", bits(eps)), ("ROPE_SCALE", bits(rope_scale))),
        ],
        grid=(B * H * (D // columns) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        shapes=[(B, T, H * D), (T, B, H, D, D) if each else (B, H, D, D)],
        dtypes=[dtype, mx.float32],
    )
    return o, new_state


def columns_of_a_slice(B: int, H: int, D: int, enough: int) -> int:
    """Columns of V that one threadgroup owns, if that makes enough threadgroups."""
    threadgroups = B * H * D // 32
    return 16 if D % 64 == 0 and threadgroups < enough else 32
