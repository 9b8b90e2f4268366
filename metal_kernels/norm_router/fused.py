"""Residual, norm and router's product as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.arguments import FLOATS, Kind, absent, bits, kind, kind_or_none
from metal_kernels.launch import Kernel
from metal_kernels.packed import Packed
from metal_kernels.quantized_moe.experts import arrays, format_template, is_readable, stored_bits

HERE = Path(__file__).parent
KERNEL = Kernel(
    HERE / "norm_router.metal",
    ("x", "r", "weight", "router_w", "router_s", "router_b"),
    ("x_new", "normed", "logits"),
    [HERE.parent / "quantized_moe" / "codes.metal", HERE / "packs.metal"],
)
MAX_TOKENS = 8
MAX_HIDDEN = 8192
# A pipeline that takes many registers may not run more on Apple's GPUs, where MLX cannot ask for fewer; see
# PIPELINE_THREADS of the tests.
MAX_THREADS = {"metal": 256, "cuda": 512}
# That a thread owns, where the threads suffice, in packs of so many: 16 bytes of a 16-bit type. Packs of a router in float32
# have half as many, since neighbouring threads use whole lines where none reads more than 16 bytes at once.
CHANNELS = 8
VALUES = 32  # of the tokens that a thread keeps in registers; half of that where more than 256 threads run

# Rows of the router a threadgroup. Mini's 256 experts make 64 threadgroups at 4 rows, which asks for the whole matrix at
# once (128 bytes a thread) and has each threadgroup read 12 KB for the norm beside 32 KB of the router in float32; at 2
# rows 128, one for each of 132 SMs. Chosen by these counts; `choices` may scale them.
ROWS = {"metal": 4, "cuda": 2}

# Names and values of MODE, BITS, GROUP, N and K of the router.
Format = tuple[tuple[str, int], ...]
NO_ROUTER: Format = (("MODE", 0), ("BITS", 32), ("GROUP", 32), ("N", 0))


def supports(x: mx.array, r: mx.array | None, weight: mx.array, router: Packed, dtype: mx.Dtype | None = None) -> bool:
    """Whether `fused_norm_router` runs these: 1 to 8 tokens of at most 8,192 channels; a router that is plain, or in 4 or
    8 bits."""
    return _router_plan(x, r, weight, router, dtype) is not None


def fused_norm_router(
    x: mx.array,
    r: mx.array | None,
    weight: mx.array,
    router: Packed,
    eps: float,
    dtype: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_norm_router`, in one dispatch, for what `supports` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _router_plan(x, r, weight, router, dtype, eps)
    if plan is None:
        got = f"x {x.shape} {x.dtype} and a {router.mode} router {router.weight.shape}"
        raise ValueError(f"[norm_router] no kernel for {got}.")
    x_new, normed, logits = _run(x, r, weight, arrays(router), plan)
    return x_new, normed, logits


def supports_add_norm(x: mx.array, r: mx.array, weight: mx.array, dtype: mx.Dtype | None = None) -> bool:
    """Whether `fused_add_norm` runs these: any number of tokens of at most 8,192 channels, and something to add."""
    return _plan(kind(x), kind(r), kind(weight), None, dtype, 0, 0.0, _most_threads()) is not None


def fused_add_norm(
    x: mx.array, r: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_add_norm` with something to add, in one dispatch, for what `supports_add_norm` says.

    Raises:
        ValueError: For anything else.
    """
    plan = _plan(kind(x), kind(r), kind(weight), None, dtype, 0, eps, _most_threads())
    if plan is None:
        raise ValueError(f"[add_norm] no kernel for x {x.shape} {x.dtype} and weight {weight.shape}.")
    x_new, normed, _ = _run(x, r, weight, [absent(mx.float32)] * 3, plan)
    return x_new, normed


def _run(
    x: mx.array, r: mx.array | None, weight: mx.array, router: list[mx.array], plan: dict[str, Any]
) -> tuple[mx.array, mx.array, mx.array]:
    x_new, normed, logits = KERNEL([x, x if r is None else r, weight, *router], **plan)
    return x if r is None else x_new, normed, logits


def _router_plan(
    x: mx.array, r: mx.array | None, weight: mx.array, router: Packed, dtype: mx.Dtype | None, eps: float = 0.0
) -> dict[str, Any] | None:
    w = router.weight
    is_plain = router.mode == "plain" and w.dtype in FLOATS and w.size >= 8
    if w.ndim != 2 or not (is_plain or (is_readable(router) and stored_bits(router) in (4, 8))):
        return None
    where = choices.where()
    rows = choices.scaled(ROWS.get(where, ROWS["metal"]), "norm_router", math.prod(x.shape[:-1]))
    form = tuple(format_template(router))
    return _plan(kind(x), kind_or_none(r), kind(weight), form, dtype, rows, eps, _most_threads())


def _most_threads() -> int:
    return MAX_THREADS.get(choices.where(), MAX_THREADS["metal"])


@lru_cache(maxsize=256)
def _plan(
    x: Kind,
    r: Kind | None,
    weight: Kind,
    router: Format | None,
    dtype: mx.Dtype | None,
    rows: int,
    eps: float,
    most_threads: int,
) -> dict[str, Any] | None:
    """How to launch, or None for what the kernel does not run."""
    (shape, x_dtype), (*leading, K) = x, x[0]
    tokens, form = math.prod(leading), dict(router or NO_ROUTER)
    dtypes = (x_dtype, x_dtype if r is None else r[1], weight[1], dtype or x_dtype)
    if any(d not in FLOATS for d in dtypes) or weight[0] != (K,) or (r is not None and r[0] != shape):
        return None
    if not 8 <= K <= MAX_HIDDEN or form.pop("K", K) != K:
        return None
    if tokens < 1 or (router is not None and tokens > MAX_TOKENS):
        return None
    E = form.pop("N")
    pack = math.gcd(K, CHANNELS if form["BITS"] < 32 or not router else CHANNELS // 2)
    threads = min(most_threads, -(-K // CHANNELS // 32) * 32)
    channels = -(-K // (pack * threads)) * pack
    values = VALUES if threads <= 256 else VALUES // 2
    chunks = -(-tokens // max(1, values // channels)) if router else tokens
    rows = max(1, rows * CHANNELS // max(channels, CHANNELS)) if router else 1
    common = x_dtype if x_dtype == weight[1] else mx.float32
    return {
        "template": [
            *form.items(),
            ("X", x_dtype),
            ("T", common),
            ("O", dtype or common),
            ("E", E),
            ("K", K),
            ("P", pack),
            ("THREADS", threads),
            ("EACH", -(-tokens // chunks)),
            ("ROWS", rows),
            ("HAS_RESIDUAL", r is not None),
            ("TOKENS", tokens if router else 0),
            ("EPS", bits(eps)),
        ],
        "grid": (chunks * threads, max(1, -(-E // rows)), 1),
        "threadgroup": (threads, 1, 1),
        "shapes": [(1,) if r is None else shape, shape, (*leading, E) if router else (1,)],
        "dtypes": [x_dtype, dtype or common, mx.float32],
    }
