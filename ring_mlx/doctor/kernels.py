"""Each operation's kernel against its plain form, on small arrays, where kernels run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Effort, Experts, Heads, Matrices, Packed, launch
from metal_kernels import dispatch as ours
from metal_kernels.failures import said
from metal_kernels.launch import Backend
from metal_kernels.machine import Store
from metal_kernels.proofs import Ledger
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding

_finding = partial(Finding, "kernels")
EPS = 1e-6
HEADS, HEAD_DIM = 3, 32
WIDTH = HEADS * HEAD_DIM
Run = Callable[[], Any]


def check() -> list[Finding]:
    """Try all of them on the present backend."""
    where = launch.backend()
    if where is None:
        if launch.is_off():
            seen = f"{launch.SWITCH}=off: plain operations"
            return [_finding("all", NOTE, seen, f"unset {launch.SWITCH} to use kernels")]
        return [_finding("all", OK, "no backend runs them here: plain operations")]
    return [_tried(where, name, run) for name, run in operations().items()]


def operations() -> dict[str, Run]:
    """By name: a call that may launch kernels."""
    keys = iter(mx.random.split(mx.random.key(7), 40))

    def normal(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
        return mx.random.normal(shape, key=next(keys)).astype(dtype)

    def quantized(*shape: int) -> Packed:
        w, scales, biases = mx.quantize(normal(*shape) / shape[-1] ** 0.5, group_size=32, bits=4)
        return Packed(w, scales, biases, 4, 32, "affine")

    rates, scale = mx.array([0.7, 0.03, 1e-5]), HEAD_DIM**-0.5
    q, k, v = (normal(1, 70, HEADS, HEAD_DIM) for _ in range(3))
    state, weight = normal(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=mx.float32), 1 + 0.2 * normal(WIDTH)
    heads, one, few = _heads(normal), normal(1, 1, 3 * WIDTH), normal(1, 5, 3 * WIDTH)
    x, r, gate = (normal(1, 2, WIDTH) for _ in range(3))
    router, bias = Packed(normal(16, WIDTH, dtype=mx.float32)), 0.1 * normal(16, dtype=mx.float32)
    both, single = Matrices(quantized(40, WIDTH), quantized(24, WIDTH)), Matrices(quantized(WIDTH, WIDTH))
    moe = Experts(quantized(5, 64, WIDTH), quantized(5, 64, WIDTH), quantized(5, WIDTH, 64))
    gated = x, gate, weight, 3, EPS
    return {
        "attention, prompt": lambda: ours.lightning_attn(q, k, v, rates, scale, state),
        "attention, a token": lambda: ours.qkv_lightning_attn(one, heads, rates, scale, 5, state),
        "norms and rotation": lambda: ours.qk_norm_rope(few, heads, 5),
        "linear gate": lambda: ours.linear_gate(*gated),
        "router": lambda: ours.route(normal(2, 16, dtype=mx.float32), bias, 3, 4, 2, 2.5, True),
        "residual and norm": lambda: ours.add_norm(x, r, weight, EPS),
        "norm and router": lambda: ours.norm_router(x, r, weight, router, EPS, mx.bfloat16),
        "norm and products": lambda: ours.norm_qmv(x, weight, EPS, both),
        "gate and product": lambda: ours.gate_qmv(*gated, single, r),
        "product and residual": lambda: ours.add_qmv(x, single, r),
        "scales of a conversion": lambda: ours.affine_fit(
            normal(8, 64), 4, 32, mx.bfloat16, Effort(((1, 6), (4, 4)), 1)
        ),
        "experts, few tokens": lambda: _experts(moe, normal(2, WIDTH)),
        "experts, many tokens": lambda: _experts(moe, normal(20, WIDTH)),
    }


def _heads(normal: Callable[..., mx.array]) -> Heads:
    turned, base = HEAD_DIM // 2, 1e4
    inv_freq = mx.array([base ** (-i / turned) for i in range(0, turned, 2)], dtype=mx.float32)
    weights = 1 + 0.2 * normal(HEAD_DIM), 1 + 0.2 * normal(HEAD_DIM)
    return Heads(HEADS, HEADS, *weights, EPS, inv_freq, 1.0, nn.RoPE(turned, base=base))


def _experts(moe: Experts, x: mx.array) -> mx.array | None:
    tokens = x.shape[0]
    scores = mx.random.uniform(shape=(tokens, moe.gate.shape[0]), key=mx.random.key(tokens))
    chosen = mx.argsort(scores, axis=-1)[:, :3].astype(mx.int32)
    weights = mx.random.uniform(0.1, 1, (tokens, 3), key=mx.random.key(1))
    kernel = ours.moe_kernel(moe, x)
    return None if kernel is None else kernel(x, chosen, weights, moe, None)


def _tried(where: Backend, name: str, run: Run) -> Finding:
    """What a ledger without verdicts says of the kernels that an operation launches."""
    ledger = Ledger(Store(None, {}))
    remedy = f"{launch.SWITCH}=off does without kernels; please report this"
    try:
        with launch.use(Backend(where.name, where.constructor, ledger)), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            mx.eval(run())
    except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
        return _finding(name, PROBLEM, f"does not run on {where.name}: {said(e)}", remedy)
    proofs = ledger.entries()
    if not proofs and heard:  # no verdict: memory was short, or the plain form failed
        return _finding(name, PROBLEM, f"does not run on {where.name}: {heard[0].message}", remedy)
    if not proofs:
        return _finding(name, OK, f"not used on {where.name}: MLX's own operations")
    launched, problem = sorted({proof["kernel"] for proof in proofs}), proofs[0]["why"]
    error = proofs[0]["error"]
    if error is None:
        return _finding(name, PROBLEM, f"does not run on {where.name}: {problem}", remedy)
    seen = f"{error:.1e} from the plain form on {where.name} ({', '.join(launched)})"
    data = {"relative_rms": error, "launched": launched}
    return _finding(name, PROBLEM, seen, remedy, data) if problem else _finding(name, OK, seen, data=data)
