"""Residual, norm and router's product as one kernel; checks shapes and launches."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from metal_kernels import choices
from metal_kernels.constants import FLOATS, PACKS, absent, bits
from metal_kernels.launch import Kernel
from metal_kernels.packed import Packed
from metal_kernels.recorded import NoKernelError

KERNEL = Kernel(
    Path(__file__).with_name("norm_router.metal"),
    ("x", "r", "weight", "router_w", "router_s", "router_b"),
    ("x_new", "normed", "logits"),
    PACKS,
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
NO_ROUTER = {"MODE": 0, "BITS": 32, "GROUP": 32, "N": 0}


def fused_norm_router(
    x: mx.array, r: mx.array | None, weight: mx.array, router: Packed, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Same contract as `naive_norm_router`, in one dispatch.

    Raises:
        NoKernelError: Unless there are 1 to 8 tokens of at most 8,192 channels, and a router that is plain, or in 4 or 8 bits.
    """
    return _launch(x, r, weight, router, eps, dtype)


def fused_add_norm(
    x: mx.array, r: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """Same contract as `naive_add_norm` with something to add, in one dispatch.

    Raises NoKernelError for no tokens, or more than 8,192 channels.
    """
    return _launch(x, r, weight, None, eps, dtype)[:2]


def _launch(
    x: mx.array, r: mx.array | None, weight: mx.array, router: Packed | None, eps: float, dtype: mx.Dtype | None
) -> tuple[mx.array, mx.array, mx.array]:
    (*leading, K), tokens = x.shape, math.prod(x.shape[:-1])
    dtypes = (x.dtype, x.dtype if r is None else r.dtype, weight.dtype, dtype or x.dtype)
    if (
        any(d not in FLOATS for d in dtypes)
        or weight.shape != (K,)
        or (r is not None and r.shape != x.shape)
        or not 8 <= K <= MAX_HIDDEN
        or tokens < 1
        or (router is not None and (tokens > MAX_TOKENS or router.shape[1:] != (K,) or not _is_readable(router)))
    ):
        name, of = (
            ("add_norm", f"weight {weight.shape}") if router is None else ("norm_router", f"router {router.shape}")
        )
        raise NoKernelError(f"[{name}] no kernel for x {x.shape} {x.dtype} and {of}.")
    form = dict(NO_ROUTER if router is None else router.template)
    form.pop("K", None)
    E, is_wide = form.pop("N"), router is not None and form["BITS"] == 32
    where = choices.where()
    pack = math.gcd(K, CHANNELS // 2 if is_wide else CHANNELS)
    threads = min(MAX_THREADS.get(where, MAX_THREADS["metal"]), -(-K // CHANNELS // 32) * 32)
    channels = -(-K // (pack * threads)) * pack
    values = VALUES if threads <= 256 else VALUES // 2
    chunks = tokens if router is None else -(-tokens // max(1, values // channels))
    rows = 1
    if router is not None:
        rows = choices.scaled(ROWS.get(where, ROWS["metal"]), "norm_router", tokens)
        rows = max(1, rows * CHANNELS // max(channels, CHANNELS))
    common = x.dtype if x.dtype == weight.dtype else mx.float32
    x_new, normed, logits = KERNEL.launch(
        [x, x if r is None else r, weight, *([absent(mx.float32)] * 3 if router is None else router.arrays)],
        template=[
            *form.items(),
            *(("X", x.dtype), ("T", common), ("O", dtype or common), ("E", E), ("K", K), ("P", pack)),
            *(("THREADS", threads), ("EACH", -(-tokens // chunks)), ("ROWS", rows)),
            *(("HAS_RESIDUAL", r is not None), ("TOKENS", 0 if router is None else tokens), ("EPS", bits(eps))),
        ],
        grid=(chunks * threads, max(1, -(-E // rows)), 1),
        threadgroup=(threads, 1, 1),
        shapes=[(1,) if r is None else x.shape, x.shape, (1,) if router is None else (*leading, E)],
        dtypes=[x.dtype, dtype or common, mx.float32],
    )
    return x if r is None else x_new, normed, logits


def _is_readable(router: Packed) -> bool:
    w = router.weight
    is_plain = router.mode == "plain" and w.dtype in FLOATS and w.size >= 8
    return w.ndim == 2 and (is_plain or (router.is_readable and router.stored_bits in (4, 8)))
