"""Each kernel beside the plain operations it replaces, at true shapes: ``python -m benchmarks.kernels --shape mini``.

The two are timed in alternation within one run, as the median of several chains of calls after a warm-up; a chain is
what a model makes of them, so that launch and Python count as they do there. Needs a backend that runs kernels. With
``--check`` each pair of results is compared as well, which is what to run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.shapes import SHAPES
from metal_kernels import launch, linear_gate, qk_norm_rope, qkv_lightning_attn, route
from ring_mlx.attention import LinearAttention, SoftmaxAttention
from ring_mlx.config import RingConfig
from ring_mlx.model import DecoderLayer
from ring_mlx.moe import MoE, Router

Case = tuple[str, Callable[[], Any]]
COLUMNS = ["device", "mlx", "backend", "shape", "kernel", "tokens", "rows", "plain_us", "kernel_us", "ratio"]


def cases(config: RingConfig, T: int, B: int, bits: int) -> Iterator[Case]:
    """Each operation as a call without arguments, on random data of the config's shapes."""
    dtype = mx.bfloat16
    c = config
    linear, softmax = LinearAttention(c, 1), SoftmaxAttention(c)
    width, heads = c.num_attention_heads * c.head_dim, linear.heads()
    state = mx.random.normal((B, c.num_attention_heads, c.head_dim, c.head_dim))
    qkv = mx.random.normal((B, T, 3 * width)).astype(dtype)
    yield "qkv_lightning_attn", lambda: qkv_lightning_attn(qkv, heads, linear.decay_rate, linear.scale, 7, state)
    narrow = mx.random.normal((B, T, width + 2 * c.num_key_value_heads * c.head_dim)).astype(dtype)
    yield "qk_norm_rope", lambda: qk_norm_rope(narrow, softmax.heads(), 7)
    x, gate = (mx.random.normal((B, T, width)).astype(dtype) for _ in range(2))
    weight = mx.random.normal((width,)).astype(dtype)
    yield "linear_gate", lambda: linear_gate(x, gate, weight, c.group_norm_size, c.rms_norm_eps)
    logits, bias = mx.random.normal((B, T, c.num_experts)), 0.1 * mx.random.normal((c.num_experts,))
    options = (c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor, c.norm_topk_prob)
    yield "route", lambda: route(logits, bias, *options)
    moe = quantised(MoE(c), bits)
    hidden = mx.random.normal((B, T, c.hidden_size)).astype(dtype)
    yield "moe (with router)", lambda: moe(hidden, dtype, hidden)
    layer = quantised(DecoderLayer(c, 1), bits)
    yield "linear layer", lambda: layer(hidden, None, None, 7)


def quantised(block: Any, bits: int) -> Any:
    """The block in bfloat16, its matrices quantised in groups of 64 unless ``bits`` is 0; the router stays float32."""
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


def chain_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds a call, over so many calls that are evaluated together."""
    mx.synchronize()
    started = time.perf_counter()
    mx.eval([call() for _ in range(calls)])
    mx.synchronize()
    return (time.perf_counter() - started) / calls * 1e6


def difference(call: Callable[[], Any]) -> float:
    """The largest relative RMS between kernel and plain outputs of floats."""
    fast = call()
    with launch.use(None):
        plain = call()
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (fast, plain)), strict=True)
    worst = 0.0
    for a, e in ((a.astype(mx.float32), e.astype(mx.float32)) for a, e in pairs if mx.issubdtype(e.dtype, mx.floating)):
        worst = max(worst, float(mx.sqrt(((a - e) ** 2).mean() / mx.maximum((e**2).mean(), 1e-30))))
    return worst


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("mini", "flash", "tiny"), default="mini")
    parser.add_argument("--tokens", default="1,8,2048")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=32, help="calls in a chain; fewer for many tokens")
    parser.add_argument("--compiled", action="store_true", help="both through mx.compile, as a decode step runs")
    parser.add_argument("--check", action="store_true", help="compare the results instead of timing them")
    parser.add_argument("--csv", help="file to append to")
    args = parser.parse_args()
    where = launch.backend()
    if where is None:
        parser.exit(2, "no backend runs kernels here\n")
    device = mx.device_info().get("device_name", "?")
    how = "compiled" if args.compiled else "from Python"
    print(f"{device}, mlx {mx.__version__}, {where.name}, {args.shape}, {args.bits} bits, {how}, n={args.repeats}")
    lines = []
    for T in map(int, args.tokens.split(",")):
        for name, call in cases(RingConfig.from_dict(SHAPES[args.shape]), T, args.batch, args.bits):
            if args.check:
                print(f"{name:20} {T:6d} tokens: differs by {difference(call):.2e}")
                continue
            plain, fast = measure(call, args.calls if T < 64 else max(2, args.calls // 8), args.repeats, args.compiled)
            print(f"{name:20} {T:6d} tokens: plain {plain:10.1f} us, kernel {fast:10.1f} us, {plain / fast:6.2f} times")
            numbers = [f"{plain:.1f}", f"{fast:.1f}", f"{plain / fast:.2f}"]
            lines.append([device, mx.__version__, where.name, args.shape, name, T, args.batch, *numbers])
    if args.csv and lines:
        write_csv(Path(args.csv), lines)


def measure(call: Callable[[], Any], calls: int, repeats: int, is_compiled: bool) -> tuple[float, float]:
    """Medians of plain and kernel."""
    found: dict[bool, list[float]] = {True: [], False: []}
    forms = {is_plain: mx.compile(lambda: call()) if is_compiled else call for is_plain in found}
    for repeat in range(repeats + 1):
        for is_plain, form in forms.items():
            with launch.use(None if is_plain else launch.backend()):
                us = chain_us(form, calls)
            if repeat:
                found[is_plain].append(us)
    return statistics.median(found[True]), statistics.median(found[False])


def write_csv(path: Path, lines: list[list[Any]]) -> None:
    """Append, with a header where the file is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([COLUMNS, *lines] if is_new else lines)


if __name__ == "__main__":
    main()
