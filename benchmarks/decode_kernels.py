"""The GPU's own time in a decode step: ``python -m benchmarks.decode_kernels --shape mini`` (CUDA only).

MLX hands a step over more slowly than a fast GPU runs it, so a clock around the step shows the host. Here the GPU is first
kept busy for 30 ms by a kernel that only waits; what is handed over meanwhile then runs without a gap, and the time that it
takes beyond those 30 ms is the GPU's. With

    MLX_USE_CUDA_GRAPHS=0 MLX_MAX_OPS_PER_BUFFER=1000 MLX_MAX_MB_PER_BUFFER=1000000

before it, each kernel of the step follows, replayed with that step's arguments. MLX then launches one after the other, where
a graph would let equal ones overlap, and waits for none; each includes some 2 us of launch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx

from benchmarks.common import arguments, random, report
from benchmarks.decode_profile import after_prompt
from metal_kernels import launch
from ring_mlx.model import decode_step
from ring_mlx.model.model import Model

BUSY_MS = 30
REPLAYS = 200
WARM_UP = 2
WAIT = """
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < MS * 1000000ULL);
  out[0] = x[0];
"""
Launch = tuple[launch.Kernel, list[mx.array], dict[str, Any]]


class Gpu:
    """Times what runs behind the waiting kernel."""

    def __init__(self) -> None:
        self._wait = mx.fast.cuda_kernel(name="wait", input_names=["x"], output_names=["out"], source=WAIT)
        self._x = mx.zeros((1,))
        mx.eval(self._x)
        self._alone = self._median(list, 9)

    def milliseconds(self, make: Callable[[], list[mx.array]], repeats: int = 5) -> float:
        """The median GPU time of what ``make`` asks for, which must be handed over within 30 ms."""
        return self._median(make, repeats) - self._alone

    def _median(self, make: Callable[[], list[mx.array]], repeats: int) -> float:
        found = []
        for _ in range(WARM_UP + repeats):
            mx.synchronize()
            began = time.perf_counter()
            mx.async_eval(self._busy())
            made = make()
            mx.async_eval(*made)
            mx.synchronize()
            found.append(1e3 * (time.perf_counter() - began))
        return statistics.median(found[WARM_UP:])

    def _busy(self) -> list[mx.array]:
        one = (1, 1, 1)
        waited: list[mx.array] = self._wait(
            inputs=[self._x],
            template=[("MS", BUSY_MS)],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=one,
            threadgroup=one,
        )
        return waited


def launches(model: Model, cache: Any) -> dict[str, list[Launch]]:
    """What one step launches, by kernel, grid and kinds of arguments: its pieces are run as they are, not compiled.

    Layers that are called one by one would read the position from the host's memory, where a kernel waits 15 us for it.
    """
    seen: dict[str, list[Launch]] = {}
    call = launch.Kernel.__call__

    def record(kernel: launch.Kernel, inputs: Any, **how: Any) -> Any:
        kinds = [(x.shape, str(x.dtype)) for x in inputs]
        seen.setdefault(f"{kernel.name} {how['grid']} {kinds}", []).append((kernel, list(inputs), how))
        return call(kernel, inputs, **how)

    model.model._step = None
    with mock.patch.object(launch.Kernel, "__call__", record), mock.patch.object(decode_step, "_compiled", lambda f: f):
        mx.eval(model(mx.array([[5]]), cache, last_only=True))
    model.model._step = None
    mx.eval([inputs for found in seen.values() for _, inputs, _ in found])
    return seen


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The whole step, then each kernel of it where MLX launches them one by one."""
    gpu, model = Gpu(), random(args)
    cache, _ = after_prompt(model, args.context)
    live = cache.copy()
    step = gpu.milliseconds(lambda: [mx.argmax(model(mx.array([[5]]), live, last_only=True)[:, -1], axis=-1)])
    yield {"launched": "a step", "times": 1, "us each": 1e3 * step}
    for name, found in launches(model, cache.copy()).items() if os.environ.get("MLX_USE_CUDA_GRAPHS") == "0" else ():

        def replay(found: list[Launch] = found) -> list[mx.array]:
            picked = (found[i % len(found)] for i in range(REPLAYS))
            return [out for kernel, inputs, how in picked for out in kernel(inputs, **how)]

        us = 1e3 * gpu.milliseconds(replay) / REPLAYS
        yield {"launched": name.split(" [")[0], "times": len(found), "us each": us}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="mini")
    parser.add_argument("--context", type=int, default=512, help="tokens read before (512)")
    args = parser.parse_args()
    if not mx.cuda.is_available():
        raise SystemExit(
            "[decode_kernels] needs an NVIDIA GPU, whose clock it reads; see benchmarks.kernels elsewhere."
        )
    report(args, rows(args), f"context {args.context}")


if __name__ == "__main__":
    main()
