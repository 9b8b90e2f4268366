"""Each kernel beside the plain operations it replaces, at true shapes: ``python -m benchmarks.kernels --shape mini``.

The two are timed in alternation within one run, as the median of several chains of calls after a warm-up; a chain is
what a model makes of them, so that launch and Python count as they do there. Needs a backend that runs kernels. With
``--check`` each pair of results is compared as well, which is what to run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.common import arguments, counts, report
from metal_kernels import launch
from ring_mlx.bench.operations import cases, difference, measure
from ring_mlx.bench.shapes import SHAPES
from ring_mlx.model.config import RingConfig


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each kernel and number of tokens."""
    for T in args.tokens:
        for name, call, x in cases(RingConfig.from_dict(SHAPES[args.shape]), T, args.batch, args.bits):
            row = {
                "backend": launch.backend().name,
                "shape": args.shape,
                "kernel": name,
                "tokens": T,
                "rows": args.batch,
            }
            if args.check:
                yield row | {"differs by": difference(call, x)}
                continue
            calls = args.calls if T < 64 else max(2, args.calls // 8)
            plain, fast = measure(call, x, calls, args.repeats, args.compiled)
            yield row | {"plain_us": plain, "kernel_us": fast, "ratio": plain / fast}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="mini", repeats=7)
    parser.add_argument("--tokens", type=counts, default=(1, 8, 2048), help="with commas (1,8,2048)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=32, help="calls in a chain; fewer for many tokens")
    parser.add_argument("--compiled", action="store_true", help="both through mx.compile, as a decode step runs")
    parser.add_argument("--check", action="store_true", help="compare the results instead of timing them")
    args = parser.parse_args()
    where = launch.backend()
    if where is None:
        parser.exit(2, "no backend runs kernels here\n")
    report(args, rows(args), where.name, "compiled" if args.compiled else "from Python", f"n={args.repeats}")


if __name__ == "__main__":
    main()
