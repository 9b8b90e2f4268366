"""Each operation of a layer, as the layer calls it, at the shapes of a config: with our kernels and with MLX's operations.

The two are timed in alternation, as the median of several chains of calls after a warm-up; a chain is what a model makes of
them, so that launch and Python count as they do there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import launch, linear_gate, qk_norm_rope, qkv_lightning_attn, route
from metal_kernels.fused_qmv.fused import MAX_TOKENS
from ring_mlx.bench.measure import seconds
from ring_mlx.model.attention import LinearAttention, SoftmaxAttention
from ring_mlx.model.config import RingConfig
from ring_mlx.model.layer import DecoderLayer
from ring_mlx.model.moe import MoE, Router

Call = Callable[[mx.array], Any]
Case = tuple[str, Call, mx.array]


def cases(config: RingConfig, T: int, B: int, bits: int) -> Iterator[Case]:
    """Each operation as a call of one argument, and that argument: random data of the config's shapes."""
    dtype = mx.bfloat16
    c = config
    linear, softmax = quantized(LinearAttention(c, 1), bits), quantized(SoftmaxAttention(c), bits)
    width, heads = c.num_attention_heads * c.head_dim, linear.heads()
    state = mx.random.normal((B, c.num_attention_heads, c.head_dim, c.head_dim))
    qkv = mx.random.normal((B, T, 3 * width)).astype(dtype)
    yield "qkv_lightning_attn", lambda a: qkv_lightning_attn(a, heads, linear.decay_rate, linear.scale, 7, state), qkv
    narrow = mx.random.normal((B, T, width + 2 * c.num_key_value_heads * c.head_dim)).astype(dtype)
    yield "qk_norm_rope", lambda a: qk_norm_rope(a, softmax.heads(), 7), narrow
    x, gate = (mx.random.normal((B, T, width)).astype(dtype) for _ in range(2))
    weight = mx.random.normal((width,)).astype(dtype)
    yield "linear_gate", lambda a: linear_gate(a, gate, weight, c.group_norm_size, c.rms_norm_eps), x
    logits, bias = mx.random.normal((B, T, c.num_experts)), 0.1 * mx.random.normal((c.num_experts,))
    options = (c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor, c.norm_topk_prob)
    yield "route", lambda a: route(a, bias, *options), logits
    moe = quantized(MoE(c), bits)
    hidden = mx.random.normal((B, T, c.hidden_size)).astype(dtype)
    yield "moe (with router)", lambda a: moe(a, dtype, a), hidden
    if B * T <= MAX_TOKENS:
        yield from few_tokens(c, moe.gate, linear, softmax, hidden, x, gate)
    layer = quantized(DecoderLayer(c, 1), bits)
    yield "linear layer", lambda a: layer(a, None, None, 7), hidden


def few_tokens(
    config: RingConfig,
    router: Router,
    linear: LinearAttention,
    softmax: SoftmaxAttention,
    hidden: mx.array,
    o: mx.array,
    gate: mx.array,
) -> Iterator[Case]:
    """The operations whose kernels take 1 to 8 tokens only, as the layers call them: hidden [B, T, hidden], o as gate."""
    dtype = hidden.dtype
    norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.weight = mx.random.normal(norm.weight.shape).astype(dtype)
    residual = mx.random.normal(hidden.shape).astype(dtype)
    yield "norm_router", lambda a: router.score(a, residual, norm, dtype), hidden
    layers = linear.query_key_value, linear.g_proj
    yield "norm_qmv", lambda a: linear.project(a, norm, *layers), hidden
    yield "gate_qmv", lambda a: _sum(*linear.close_gated(hidden, a, gate)), o
    yield "add_qmv", lambda a: _sum(*softmax.close(hidden, a)), o


def _sum(x: mx.array, r: mx.array | None) -> mx.array:
    return x if r is None else x + r


def quantized(block: Any, bits: int) -> Any:
    """The block in bfloat16, its matrices quantized in groups of 64 unless ``bits`` is 0; the router stays float32."""
    block.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(
            block, 64, bits, class_predicate=lambda p, m: hasattr(m, "to_quantized") and "gate.gate_proj" not in p
        )
    for module in block.modules():
        if isinstance(module, Router):
            module.set_dtype(mx.float32)
    block.eval()
    mx.eval(block.parameters())
    return block


def difference(call: Call, x: mx.array) -> float:
    """The largest relative RMS between kernel and plain outputs of floats."""
    fast = call(x)
    with launch.use(None):
        plain = call(x)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (fast, plain)), strict=True)
    worst = 0.0
    for a, e in ((a.astype(mx.float32), e.astype(mx.float32)) for a, e in pairs if mx.issubdtype(e.dtype, mx.floating)):
        worst = max(worst, float(mx.sqrt(((a - e) ** 2).mean() / mx.maximum((e**2).mean(), 1e-30))))
    return worst


def chain(call: Call, x: mx.array, calls: int) -> list[Any]:
    """So many calls, to be evaluated together."""
    return [call(x) for _ in range(calls)]


def measure(call: Call, x: mx.array, calls: int, repeats: int, is_compiled: bool) -> tuple[float, float]:
    """Medians of plain and kernel in microseconds a call; x is an argument of the compiled forms, as of a decode step."""
    found: dict[bool, list[float]] = {True: [], False: []}
    forms = {is_plain: mx.compile(lambda a: call(a)) if is_compiled else call for is_plain in found}
    for _ in range(repeats + 1):
        for is_plain, form in forms.items():
            with launch.use(None if is_plain else launch.backend()):
                found[is_plain].append(seconds(partial(chain, form, x, calls)) / calls * 1e6)
    return statistics.median(found[True][1:]), statistics.median(found[False][1:])
