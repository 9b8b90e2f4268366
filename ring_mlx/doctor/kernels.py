"""Each operation's kernel against its plain form, on small arrays, where kernels run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import (
    Experts,
    Heads,
    Matrices,
    Packed,
    add_norm,
    add_qmv,
    gate_qmv,
    launch,
    lightning_attn,
    linear_gate,
    moe_kernel,
    naive_lightning_attn,
    norm_qmv,
    norm_router,
    qk_norm_rope,
    qkv_lightning_attn,
    route,
)
from metal_kernels.fused_qmv import naive_add_qmv, naive_gate_qmv, naive_norm_qmv
from metal_kernels.launch import Backend
from metal_kernels.norm_router import naive_norm_router
from metal_kernels.quantized_moe import naive_moe
from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding

_finding = partial(Finding, "kernels")
# bfloat16 rounds by 0.4 %; a wrong kernel is near 1 or above.
LIMIT = 0.03
EPS = 1e-6
HEADS, HEAD_DIM = 3, 32
WIDTH = HEADS * HEAD_DIM
Result = Sequence[mx.array] | None
Run = Callable[[], Any]


def check() -> list[Finding]:
    """Try all of them on the present backend."""
    where = launch.backend()
    if where is None:
        if launch.is_off():
            seen = f"{launch.SWITCH}=off: plain operations"
            return [_finding("all", NOTE, seen, f"unset {launch.SWITCH} to use kernels")]
        return [_finding("all", OK, "no backend runs them here: plain operations")]
    return [_tried(where, name, run, plain) for name, (run, plain) in operations().items()]


def operations() -> dict[str, tuple[Run, Run]]:
    """By name: a call that may launch kernels, or gives None where MLX does the work, and its plain form."""
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
    chosen_by = normal(2, 16, dtype=mx.float32), bias, 3, 4, 2, 2.5, True
    both, single = Matrices(quantized(40, WIDTH), quantized(24, WIDTH)), Matrices(quantized(WIDTH, WIDTH))
    moe = Experts(quantized(5, 64, WIDTH), quantized(5, 64, WIDTH), quantized(5, WIDTH, 64))
    attended, gated = (q, k, v, rates, scale, state), (x, gate, weight, 3, EPS)
    fused, recurrent = (x, r, weight, router, EPS, mx.bfloat16), (one, heads, rates, scale, 5, state)
    return {
        "attention, prompt": (lambda: lightning_attn(*attended), lambda: naive_lightning_attn(*attended)),
        "attention, a token": (lambda: qkv_lightning_attn(*recurrent), lambda: qkv_lightning_attn(*recurrent)),
        "norms and rotation": (lambda: qk_norm_rope(few, heads, 5), lambda: heads.split(few, 5)),
        "linear gate": (lambda: [linear_gate(*gated)], lambda: [linear_gate(*gated)]),
        "router": (lambda: route(*chosen_by), lambda: route(*chosen_by)),
        "residual and norm": (lambda: add_norm(x, r, weight, EPS), lambda: add_norm(x, r, weight, EPS)),
        "norm and router": (lambda: norm_router(*fused), lambda: naive_norm_router(*fused)),
        "norm and products": (lambda: norm_qmv(x, weight, EPS, both), lambda: naive_norm_qmv(x, weight, EPS, both)),
        "gate and product": (lambda: _one(gate_qmv(*gated, single, r)), lambda: [naive_gate_qmv(*gated, single, r)]),
        "product and residual": (lambda: _one(add_qmv(x, single, r)), lambda: [naive_add_qmv(x, single, r)]),
        "experts, few tokens": _experts(moe, normal(2, WIDTH)),
        "experts, many tokens": _experts(moe, normal(20, WIDTH)),
    }


def _heads(normal: Callable[..., mx.array]) -> Heads:
    turned, base = HEAD_DIM // 2, 1e4
    inv_freq = mx.array([base ** (-i / turned) for i in range(0, turned, 2)], dtype=mx.float32)
    weights = 1 + 0.2 * normal(HEAD_DIM), 1 + 0.2 * normal(HEAD_DIM)
    return Heads(HEADS, HEADS, *weights, EPS, inv_freq, 1.0, nn.RoPE(turned, base=base))


def _experts(moe: Experts, x: mx.array) -> tuple[Run, Run]:
    tokens = x.shape[0]
    scores = mx.random.uniform(shape=(tokens, moe.gate.shape[0]), key=mx.random.key(tokens))
    chosen = mx.argsort(scores, axis=-1)[:, :3].astype(mx.int32)
    weights = mx.random.uniform(0.1, 1, (tokens, 3), key=mx.random.key(1))

    def run() -> Result:
        kernel = moe_kernel(moe, x)
        return None if kernel is None else _one(kernel(x, chosen, weights, moe, None))

    return run, lambda: [naive_moe(x, chosen, weights, moe.gate, moe.up, moe.down)]


def _one(y: mx.array | None) -> Result:
    return None if y is None else [y]


def _tried(where: Backend, name: str, run: Run, plain: Run) -> Finding:
    launched: set[str] = set()
    remedy = f"{launch.SWITCH}=off does without kernels; please report this"
    try:
        with launch.use(_recording(where, launched)):
            found = run()
            mx.eval(found)
        if found is None or not launched:
            return _finding(name, OK, f"not used on {where.name}: MLX's own operations")
        with launch.use(None):
            expected = plain()
            error = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
        said = " ".join(str(e).split())[:300] or type(e).__name__
        return _finding(name, PROBLEM, f"does not run on {where.name}: {said}", remedy)
    seen = f"{error:.1e} from the plain form on {where.name} ({', '.join(sorted(launched))})"
    data = {"relative_rms": error, "launched": sorted(launched)}
    if not error <= LIMIT:
        return _finding(name, PROBLEM, seen, remedy, data)
    return _finding(name, OK, seen, data=data)


def _recording(where: Backend, launched: set[str]) -> Backend:
    """The same backend; it notes the name of each launched kernel."""

    def construct(**arguments: Any) -> Any:
        kernel = where.constructor(**arguments)

        def call(**inputs: Any) -> Any:
            launched.add(arguments["name"])
            return kernel(**inputs)

        return call

    return Backend(where.name, construct)


def _difference(a: mx.array, b: mx.array) -> float:
    """Relative RMS; infinite where a number is not finite or shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    error = mx.sqrt(((a - b) ** 2).mean() / mx.maximum((b**2).mean(), 1e-30))
    return float(mx.where(mx.isnan(error), mx.inf, error))
