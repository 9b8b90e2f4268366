"""Lightning attention of a decode step as one kernel, from the fused projection; checks shapes and launches."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.arguments import FLOATS, Kind, absent, are_norm_weights, bits, kind, kind_or_none, positions
from metal_kernels.launch import Kernel

HERE = Path(__file__).parent
KERNEL = Kernel(
    HERE / "fused_recurrent.metal",
    ("qkv", "q_weight", "k_weight", "inv_freq", "offset", "decay_rate", "state", "mask"),
    ("o", "new_state"),
    [HERE.parent / "quantized_moe" / "codes.metal", HERE.parent / "norm_router" / "packs.metal"],
)
MAX_TOKENS = 8
SIMDGROUPS = 8
# A slice of 32 columns is 128 bytes of a row of the state, one cache line; of 16, half of one, but twice as many
# threadgroups: B * H * D / 32 of them below this number leave cores of an H100 idle (132). On Apple's GPUs whole lines go
# first: mini's 64 threadgroups keep as many of 10 to 40 cores busy as 128 would (80 to 100 %), with as many bytes under way.
ENOUGH_THREADGROUPS = {"metal": 1, "cuda": 128}


def supports(
    qkv: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    inv_freq: mx.array,
    decay_rate: mx.array,
) -> bool:
    """Whether `fused_qkv_lightning_attn` runs these.

    It takes 1 to 8 tokens, heads of a multiple of 32 up to 256, and both norm weights of one dtype or neither.
    """
    kinds = kind(qkv), kind_or_none(q_weight), kind_or_none(k_weight), kind(inv_freq), kind(decay_rate)
    return _plan(*kinds, None, None, 1, 1.0, 0.0, 1.0, 1, False) is not None


def fused_qkv_lightning_attn(
    qkv: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    inv_freq: mx.array,
    rope_scale: float,
    offset: int | mx.array,
    decay_rate: mx.array,
    scale: float,
    eps: float,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_qkv_lightning_attn`, in one dispatch, for what `supports` says.

    Raises:
        ValueError: For anything else, or if the state or the mask has another shape or dtype.
    """
    where = positions(offset)
    kinds = kind(qkv), kind_or_none(q_weight), kind_or_none(k_weight), kind(inv_freq), kind(decay_rate)
    is_other = choices.variant("recurrent", qkv.shape[1]) == choices.OTHER_WIDTH
    enough = ENOUGH_THREADGROUPS.get(choices.where(), ENOUGH_THREADGROUPS["metal"])
    numbers = where.shape[0], scale, eps, rope_scale, enough, is_other
    plan = _plan(*kinds, kind_or_none(state), kind_or_none(mask), *numbers)
    if plan is None:
        raise ValueError(
            f"[qkv_lightning_attn] no kernel for qkv {qkv.shape} {qkv.dtype} and {decay_rate.shape} heads."
        )
    weights = (absent(mx.float32),) * 2 if q_weight is None or k_weight is None else (q_weight, k_weight)
    inputs = [
        qkv,
        *weights,
        inv_freq,
        where,
        decay_rate,
        absent(mx.float32) if state is None else state,
        where if mask is None else mask,
    ]
    o, new_state = KERNEL(inputs, **plan)
    return o, new_state


def columns_of_a_slice(B: int, H: int, D: int, enough: int) -> int:
    """Columns of V that one threadgroup owns, if that makes enough threadgroups."""
    threadgroups = B * H * D // 32
    return 16 if D % 64 == 0 and threadgroups < enough else 32


@lru_cache(maxsize=256)
def _plan(
    qkv: Kind,
    q_weight: Kind | None,
    k_weight: Kind | None,
    inv_freq: Kind,
    decay_rate: Kind,
    state: Kind | None,
    mask: Kind | None,
    offsets: int,
    scale: float,
    eps: float,
    rope_scale: float,
    enough: int,
    is_other_width: bool,
) -> dict[str, Any] | None:
    """How to launch, or None for what the kernel does not run."""
    (B, T, width), dtype = qkv
    H, R = decay_rate[0][0], 2 * inv_freq[0][0]
    D = width // (3 * H)
    if dtype not in FLOATS or B < 1 or not 1 <= T <= MAX_TOKENS or offsets not in (1, B):
        return None
    if width != 3 * H * D or D % 32 or not 32 <= D <= 256 or not are_norm_weights(q_weight, k_weight, D):
        return None
    if not 2 <= R <= D or inv_freq[1] != mx.float32 or decay_rate[1] != mx.float32:
        return None
    if state not in (None, ((B, H, D, D), mx.float32)):
        raise ValueError(f"[qkv_lightning_attn] state must be {(B, H, D, D)} float32 but got {state}.")
    if mask not in (None, ((B, T), mx.bool_)):
        raise ValueError(f"[qkv_lightning_attn] mask must be {(B, T)} bool but got {mask}.")
    columns = columns_of_a_slice(B, H, D, enough)
    if is_other_width and D % 64 == 0:
        columns = 48 - columns
    return {
        "template": [
            ("T", dtype),
            ("W", mx.float32 if q_weight is None else q_weight[1]),
            ("N", T),
            ("H", H),
            ("D", D),
            ("R", R),
            ("COLUMNS", columns),
            ("SIMDGROUPS", SIMDGROUPS),
            ("NORM", q_weight is not None),
            ("HAS_STATE", state is not None),
            ("HAS_MASK", mask is not None),
            ("PER_ROW", offsets > 1),
            ("SCALE", bits(scale)),
            ("EPS", bits(eps)),
            ("ROPE_SCALE", bits(rope_scale)),
        ],
        "grid": (B * H * (D // columns) * SIMDGROUPS * 32, 1, 1),
        "threadgroup": (SIMDGROUPS * 32, 1, 1),
        "shapes": [(B, T, H * D), (B, H, D, D)],
        "dtypes": [dtype, mx.float32],
    }
