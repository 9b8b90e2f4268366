"""Bytes that our Metal kernels ask for, over those they need: ``python -m benchmarks.traffic --shape mini --bits 4``.

A figure of the Metal source, the same on every chip: the simulator of the tests runs each different launch of a forward pass
at the model's true shapes and counts. Nothing is timed, no weight is made: what a kernel asks for depends on indices only.

A SIMD-group's *access* is one load or store of its 32 lanes. Its bytes count once, however many lanes want them; what another
access, SIMD-group or threadgroup wants again counts again, though a cache will often serve it. *Lines* are those of 128 bytes
that an access touches, counted from the start of its array. *Needed* is each input once and each output once, of experts the
chosen ones only; what a launch never touches is not needed. Activations (all but packed weights, their scales and biases, and
the recurrent state) are small and read by every threadgroup, so the ratio is given without and with them: all else is read
from memory and must be asked for once. Arrays of fewer than 8 elements and shapes, which MLX puts in constant memory, and what
MLX's own operations ask for, which do the rest of a forward pass, are not counted.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx

from metal_kernels import launch
from metal_kernels.fused_qmv.fused import MAX_TOKENS
from metal_kernels.twin.spec import MIN_DEVICE_SIZE
from ring_mlx.bench.random_weights import empty_model
from ring_mlx.bench.shapes import SHAPES, cut
from ring_mlx.model import decode_step
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model
from ring_mlx.options import counts
from tests.metal_sim import SimulatedKernel, metal_kernel
from tests.metal_sim.runtime import RunInfo

LINE_BYTES = 128
EXPERTS = 64  # of a stack in the simulator; more are never chosen at once by a few tokens
MOST_THREADGROUPS = 2048  # of a launch that are run; of more, one in so many
PROMPT_BEFORE = 9
MEMORY = re.compile(r"_[wsb]$|^(new_)?state$|^updates$")  # arrays that are no activations
Arguments = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Launch:
    """One launch, by kinds of arguments: the kernel's constructor's and the call's."""

    kernel: Arguments
    call: Arguments
    inputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    values: tuple[tuple[int, tuple[int, ...]], ...]  # of short inputs of integers, by number

    @property
    def name(self) -> str:
        """As `metal_kernels` calls it."""
        name: str = dict(self.kernel)["name"]
        return name


def recorded(run: Callable[[], object], backend: str = "metal") -> Counter[Launch]:
    """What ``run`` launches with the tables of a backend; every kernel gives zeros that nobody computes."""
    seen: Counter[Launch] = Counter()
    where = launch.Backend(backend, lambda **of: _recorder(_frozen(of), seen))
    with launch.use(where), mock.patch.object(decode_step, "COMPILED_ON", ()):
        run()
    return seen


def launches(model: Model, tokens: int, backend: str = "metal") -> Counter[Launch]:
    """Of a forward pass of so many tokens: one to eight follow on others, more are a prompt."""
    cache = None
    if tokens <= MAX_TOKENS:
        cache = model.make_cache()
        recorded(lambda: model(mx.zeros((1, PROMPT_BEFORE), mx.int32), cache), backend)
    is_last_only = tokens == 1 or tokens > MAX_TOKENS  # of a few tokens, each one's logits are asked for
    return recorded(lambda: model(mx.zeros((1, tokens), mx.int32), cache, last_only=is_last_only), backend)


def true_model(shape: str, bits: int, layers: int | None = None) -> Model:
    """A model of a known shape whose weights are never made; the router stays as it is."""
    model = empty_model(RingConfig.from_dict(cut(SHAPES[shape], layers)), bits, 64, exact=False)
    model.set_dtype(mx.bfloat16)
    for layer in model.layers:
        if "gate" in layer.mlp:
            layer.mlp.gate.set_dtype(mx.float32)
    model.eval()
    return model


def _frozen(of: dict[str, Any]) -> Arguments:
    return tuple((k, tuple(map(tuple, v)) if k in ("template", "output_shapes") else _tuple(v)) for k, v in of.items())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _recorder(kernel: Arguments, seen: Counter[Launch]) -> Callable[..., list[mx.array]]:
    def call(*, inputs: list[mx.array], **of: Any) -> list[mx.array]:
        short = ((i, x) for i, x in enumerate(inputs) if x.ndim == 1 and x.size <= EXPERTS and x.dtype == mx.int32)
        values = tuple((i, tuple(x.tolist())) for i, x in short)
        seen[Launch(kernel, _frozen(of), tuple((x.shape, x.dtype) for x in inputs), values)] += 1
        return [mx.zeros(s, d) for s, d in zip(of["output_shapes"], of["output_dtypes"], strict=True)]

    return call


class Measured(NamedTuple):
    """Bytes of one launch.

    Attributes:
        needed: By buffer.
        asked: By buffer.
        used: Bytes that accesses used of the lines that they touched.
        touched: Bytes of those lines.
        every: One threadgroup in so many was run; what was asked is for all.
        info: The simulator's own record.
    """

    needed: dict[str, int]
    asked: dict[str, int]
    used: int
    touched: int
    every: int
    info: RunInfo

    def ratio(self, names: Iterable[str]) -> float:
        """Asked over needed of these buffers."""
        names = list(names)
        return sum(self.asked[n] for n in names) / max(1, sum(self.needed[n] for n in names))

    @property
    def memory(self) -> list[str]:
        """Buffers that are no activations."""
        return [n for n in self.needed if MEMORY.search(n)]

    @property
    def line_use(self) -> float:
        """The part of the touched lines that was used."""
        return self.used / max(1, self.touched)


def measure(one: Launch, threadgroups: int = MOST_THREADGROUPS) -> Measured:
    """Count one launch in the simulator, which runs so many threadgroups of it or fewer."""
    kernel, call = dict(one.kernel), dict(one.call)
    groups = prod(-(-g // t) for g, t in zip(call["grid"], call["threadgroup"], strict=True))
    every = -(-groups // threadgroups)
    count = metal_kernel(**kernel, mode="check", strict=False, count=True, every=every)
    values = dict(one.values)
    full = dict(zip(kernel["input_names"], one.inputs, strict=True))
    inputs = [
        _chosen(*_choice(full)) if name == "chosen" else _input(name, *kind, values.get(i))
        for i, (name, kind) in enumerate(full.items())
    ]
    count(inputs=inputs, **call)
    info = SimulatedKernel.last
    assert info is not None
    full |= {
        n: (s, d) for n, s, d in zip(kernel["output_names"], call["output_shapes"], call["output_dtypes"], strict=True)
    }
    chosen = _chosen(*_choice(full)) if "chosen" in full else mx.zeros((0,))
    needed, asked = {}, {}
    for t in info.traffic:
        shape, dtype = full.get(t.name, ((), mx.uint8))
        if (t.reads.accesses or t.writes.accesses) and prod(shape) >= MIN_DEVICE_SIZE:
            is_stack = len(shape) == 3 and MEMORY.search(t.name) is not None and "chosen" in full
            active = len(set(chosen.reshape(-1).tolist())) if is_stack else 1
            whole, touched = active * prod(shape[is_stack:]) * dtype.size, max(t.distinct_read, t.distinct_written)
            needed[t.name] = min(whole, touched) if every == 1 else whole
            asked[t.name] = (t.reads.nbytes + t.writes.nbytes) * every
    used = sum(t.reads.nbytes + t.writes.nbytes for t in info.traffic if t.name in needed)
    lines = sum(t.reads.lines + t.writes.lines for t in info.traffic if t.name in needed)
    return Measured(needed, asked, used, lines * LINE_BYTES, every, info)


def _input(name: str, shape: tuple[int, ...], dtype: mx.Dtype, value: tuple[int, ...] | None) -> mx.array:
    if value is not None:
        return mx.array(value, dtype)
    return mx.zeros((min(shape[0], EXPERTS), *shape[1:]) if len(shape) == 3 and MEMORY.search(name) else shape, dtype)


def _choice(full: dict[str, tuple[tuple[int, ...], mx.Dtype]]) -> tuple[tuple[int, ...], int]:
    """The shape of a launch's choice of experts, and how many there are."""
    stacks = (shape[0] for name, (shape, _) in full.items() if len(shape) == 3 and MEMORY.search(name))
    return full["chosen"][0], max(stacks, default=EXPERTS)


def _chosen(shape: tuple[int, ...], experts: int) -> mx.array:
    """Experts of each token, drawn as if tokens had nothing in common, and numbered as they come."""
    draws, numbers = random.Random(0), dict[int, int]()
    picks = [pick for _ in range(prod(shape[:-1])) for pick in draws.sample(range(experts), shape[-1])]
    return mx.array([numbers.setdefault(pick, len(numbers)) for pick in picks], mx.int32).reshape(shape)


def row(one: Launch, count: int, m: Measured) -> str:
    """A line of the table."""
    memory = f"{m.ratio(m.memory):.2f}" if m.memory else "-"
    cells = [one.name.removeprefix("ring_"), count, f"{sum(m.needed.values()) / 1024:,.1f}", memory]
    cells += [f"{m.ratio(m.needed):.2f}", f"{100 * m.line_use:.0f} %", f"{m.info.threadgroup_bytes / 1024:.1f}"]
    cells += [f"{(m.info.threadgroup_read + m.info.threadgroup_written) * m.every / 1024:,.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(model: Model, tokens: int, backend: str = "metal") -> list[str]:
    """Lines to print for a forward pass of so many tokens."""
    titles = ("kernel", "launches", "needed KB", "asked/needed", "with activations")
    titles += ("lines used", "threadgroup KB", "KB asked there")
    found = [(one, count, measure(one)) for one, count in launches(model, tokens, backend).items()]
    rows = [row(*each) for each in found]
    return ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1), *rows, _sum(found)]


def _sum(found: Sequence[tuple[Launch, int, Measured]]) -> str:
    """The last line, of all launches."""

    def total(of: Callable[[Measured], int]) -> int:
        return sum(count * of(m) for _, count, m in found)

    needed, asked = total(lambda m: sum(m.needed.values())), total(lambda m: sum(m.asked.values()))
    memory = total(lambda m: sum(m.asked[n] for n in m.memory)) / total(lambda m: sum(m.needed[n] for n in m.memory))
    used = 100 * total(lambda m: m.used * m.every) / total(lambda m: m.touched * m.every)
    launched = total(lambda m: 1)
    cells = f"{needed / 1024:,.1f} | {memory:.2f} | {asked / needed:.2f} | {used:.0f} %"
    return f"| all | {launched} | {cells} | | |"


def step_bytes(model: Model, tokens: int, context: int = 4096, threadgroups: int = MOST_THREADGROUPS) -> float:
    """Of weights, states, keys and values that a step of so many tokens asks for; each of the last and the head once.

    That is the rest of a step: MLX's operations, or our kernel for attention, ask for each key once for all tokens.
    """
    others = ((one, count) for one, count in launches(model, tokens).items() if one.name != "ring_tall_qmv")
    found = ((count, measure(one, threadgroups)) for one, count in others)
    asked = sum(count * m.asked[name] for count, m in found for name in m.memory)
    head = sum(a.nbytes for a in model.lm_head.values() if isinstance(a, mx.array))
    softmax = [layer.attention for layer in model.layers if not layer.is_linear]
    return asked + head + sum(2 * 2 * context * a.num_key_value_heads * a.head_dim for a in softmax)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("mini", "flash"), default="mini")
    parser.add_argument("--bits", type=counts, default=(4, 8), help="of the weights (4,8)")
    parser.add_argument("--tokens", type=counts, default=(1, 512), help="of a forward pass (1,512)")
    parser.add_argument("--backend", choices=("metal", "cuda"), default="metal", help="whose tables of sizes (metal)")
    parser.add_argument(
        "--steps", action="store_true", help="bytes of a step of 2 to 8 tokens over those of one, no more"
    )
    parser.add_argument("--buffers", action="store_true", help="each buffer of each kernel as well")
    args = parser.parse_args()
    for bits in args.bits:
        model = true_model(args.shape, bits)
        if args.steps:
            one, *several = (step_bytes(model, tokens) for tokens in (1, 2, 3, 4, 8))
            print(f"{args.shape}, {bits} bits: {one / 1e6:.0f} MB, times", *(f"{n / one:.2f}" for n in several))
            continue
        for tokens in args.tokens:
            print(f"\n{args.shape}, {bits} bits, tables of {args.backend}, {tokens} tokens, MLX {mx.__version__}\n")
            print("\n".join(table(model, tokens, args.backend)))
            if args.buffers:
                print_buffers(model, tokens, args.backend)


def print_buffers(model: Model, tokens: int, backend: str) -> None:
    """What each buffer of each kernel costs."""
    for one in launches(model, tokens, backend):
        m = measure(one)
        print(f"\n{one.name} {dict(one.call)['template']}")
        for t in m.info.traffic:
            if t.name in m.needed:
                lines, asked = t.reads.lines + t.writes.lines, t.reads.nbytes + t.writes.nbytes
                print(
                    f"  {t.name:16} needed {m.needed[t.name]:10,} asked {m.asked[t.name]:10,}"
                    f" touched {t.distinct_read + t.distinct_written:10,} lines used {100 * asked / (lines * LINE_BYTES):5.1f} %"
                )


if __name__ == "__main__":
    main()
