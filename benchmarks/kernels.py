"""Each kernel beside the plain operations it replaces, at true shapes: ``python -m benchmarks.kernels --shape mini``.

The two are timed in alternation within one run, as the median of several chains of calls after a warm-up; a chain is
what a model makes of them, so that launch and Python count as they do there. Needs a backend that runs kernels. With
``--check`` each pair of results is compared as well, which is what to run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.head import print_head
from metal_kernels import launch
from ring_mlx.bench.operations import cases, difference, measure
from ring_mlx.bench.report import append_csv
from ring_mlx.bench.shapes import SHAPES
from ring_mlx.model.config import RingConfig

COLUMNS = ["device", "mlx", "backend", "shape", "kernel", "tokens", "rows", "plain_us", "kernel_us", "ratio"]


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
    how = "compiled" if args.compiled else "from Python"
    machine = print_head(where.name, args.shape, f"{args.bits} bits", how, f"n={args.repeats}")
    lines = []
    for T in map(int, args.tokens.split(",")):
        for name, call, x in cases(RingConfig.from_dict(SHAPES[args.shape]), T, args.batch, args.bits):
            if args.check:
                print(f"{name:20} {T:6d} tokens: differs by {difference(call, x):.2e}")
                continue
            calls = args.calls if T < 64 else max(2, args.calls // 8)
            plain, fast = measure(call, x, calls, args.repeats, args.compiled)
            print(f"{name:20} {T:6d} tokens: plain {plain:10.1f} us, kernel {fast:10.1f} us, {plain / fast:6.2f} times")
            numbers = round(plain, 1), round(fast, 1), round(plain / fast, 2)
            found = machine["device"], machine["mlx"], where.name, args.shape, name, T, args.batch, *numbers
            lines.append(dict(zip(COLUMNS, found, strict=True)))
    if args.csv and lines:
        append_csv(Path(args.csv), COLUMNS, lines)


if __name__ == "__main__":
    main()
