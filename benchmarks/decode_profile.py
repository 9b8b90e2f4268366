"""Where a decode token's time goes: ``python -m benchmarks.decode_profile --shape mini --context 512``.

Three ways through the same weights: MLX's operations, the kernels called from Python, and the compiled step. Of each, the
milliseconds in which Python builds the graph, in which MLX hands it to the device, and in which the device is waited for
afterwards; then the speed of the library's own loop, in which these overlap. On a machine without kernels the ways are one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from benchmarks.common import arguments, random, report
from metal_kernels import launch
from ring_mlx.generation.decoding import decode, prefill
from ring_mlx.model import decode_step
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model

WAYS = ("operations", "kernels", "compiled")
WARM_UP = 15


@contextmanager
def way(name: str) -> Iterator[None]:
    """Decode in this way as long as the context lasts."""
    compiled_on = decode_step.COMPILED_ON if name == "compiled" else ()
    backend = None if name == "operations" else launch.backend()
    with launch.use(backend), mock.patch.object(decode_step, "COMPILED_ON", compiled_on):
        yield


def after_prompt(model: Model, tokens: int) -> tuple[HybridCache, mx.array]:
    """A cache that has seen so many random tokens, read in one step, and the logits of the next."""
    prompt = mx.random.randint(0, model.config.vocab_size, (tokens,), key=mx.random.key(0))
    cache = model.make_cache()
    ((_, logits),) = prefill(prompt, model, cache, [tokens])
    mx.eval(logits)
    return cache, logits


def parts(model: Model, start: HybridCache, steps: int) -> Iterator[float]:
    """Median milliseconds of building, handing over and waiting, one step after the other."""
    cache, found = start.copy(), []
    for n in range(WARM_UP + steps):
        mx.synchronize()
        times = [time.perf_counter()]
        token = mx.argmax(model(mx.array([[n + 1]]), cache, last_only=True)[:, -1], axis=-1)
        times.append(time.perf_counter())
        mx.async_eval(token, [c.state for c in cache])
        times.append(time.perf_counter())
        mx.synchronize()
        times.append(time.perf_counter())
        found.append([1e3 * (b - a) for a, b in itertools.pairwise(times)])
    return (statistics.median(column) for column in zip(*found[WARM_UP:], strict=True))


def speed(model: Model, start: HybridCache, logits: mx.array, steps: int) -> float:
    """Tokens a second of `ring_mlx.generation.decoding.decode`."""
    tokens = decode(logits, model, start.copy(), mx.array([0]), max_tokens=steps + 1)
    next(tokens)
    began = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - began)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each way."""
    model = random(args)
    cache, logits = after_prompt(model, args.context)
    for name in WAYS:
        with way(name):
            times = zip(("building ms", "handing over ms", "waiting ms"), parts(model, cache, args.steps), strict=True)
            speeds = [speed(model, cache, logits, args.steps) for _ in range(args.repeats + 1)][1:]
        yield {"way": name, **dict(times), "overlapped tok/s": speeds}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="mini", repeats=5)
    parser.add_argument("--context", type=int, default=512, help="tokens read before (512)")
    parser.add_argument("--steps", type=int, default=100, help="tokens of each measurement (100)")
    args = parser.parse_args()
    report(args, rows(args), f"context {args.context}")


if __name__ == "__main__":
    main()
