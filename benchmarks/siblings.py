"""The hybrid beside its softmax sibling, from rows of one machine: ``python -m benchmarks.siblings CSV [--plot PNG]``.

Takes what ``ring-mlx bench --random mini`` and ``--random mini-softmax`` appended to the CSV on one day with the same
step, and prints speeds and their ratio against context, beside the ratio of the paper's figures 7 and 8.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import arguments, report

# Mini-linear over Ring-mini-2.0 by context in units of 1,024 tokens, arXiv 2510.19338, read off figures 7 and 8 to
# about 2 %: prefill of one row, decode of 64 rows, on an H20.
PAPER = {
    "prefill": {4: 3.52 / 5.06, 8: 5.20 / 5.09, 16: 5.84 / 4.50, 32: 6.90 / 3.65, 64: 8.55 / 3.09, 128: 8.46 / 2.65},
    "decode": {4: 2.76 / 2.63, 8: 4.92 / 4.62, 16: 6.84 / 5.70, 32: 12.14 / 6.72, 64: 16.24 / 7.34},
}


class Pair(NamedTuple):
    """Tokens a second of the hybrid and of the sibling for rows of this many tokens."""

    batch: int
    context: int
    hybrid: float
    sibling: float


def pairs(path: Path, part: str, shape: str) -> Iterator[Pair]:
    """What both models have measured on the last day that the sibling was, the last of each batch and context."""
    found: dict[tuple[str, ...], dict[tuple[str, int, int], float]] = {}
    last: tuple[str, ...] = ()
    with path.open(newline="") as f:
        for row in csv.DictReader(f):
            name = row["model"].partition(",")[0]
            if row["engine"] == "ring-mlx" and row[f"{part}_tps_median"]:
                when = row["date"][:10], row["device"], row["prefill_step"]
                last = when if name == f"{shape}-softmax" else last
                at = name, int(row["batch"]), int(row["context"])
                found.setdefault(when, {})[at] = float(row[f"{part}_tps_median"])
    speeds = found.get(last, {})
    for (name, batch, context), speed in sorted(speeds.items()):
        if name == f"{shape}-softmax" and (shape, batch, context) in speeds:
            yield Pair(batch, context, speeds[shape, batch, context], speed)


def table(path: Path, shape: str) -> Iterator[dict[str, Any]]:
    """A row for each of `pairs`, beside the paper's ratio."""
    for part, ratios in PAPER.items():
        for p in pairs(path, part, shape):
            paper = ratios.get(2 ** round(math.log2(p.context / 1024)))
            row = {"part": part, "rows": p.batch, "context": p.context, "hybrid tok/s": p.hybrid}
            yield row | {"softmax tok/s": p.sibling, "ratio": p.hybrid / p.sibling, "paper": paper}


def plot(path: Path, shape: str, out: Path) -> None:
    """Seconds for a prompt and milliseconds for a step against context, one line a model and batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        rows = list(pairs(path, part, shape))
        for batch in sorted({p.batch for p in rows}):
            mine = [p for p in rows if p.batch == batch]
            at = [p.context for p in mine]
            tokens, unit = (at, 1.0) if part == "prefill" else ([1] * len(at), 1e3)
            for name, speeds in ((shape, [p.hybrid for p in mine]), (f"{shape}-softmax", [p.sibling for p in mine])):
                costs = [unit * batch * n / speed for n, speed in zip(tokens, speeds, strict=True)]
                axes.plot(at, costs, marker="o", label=f"{name}, {batch} row{'s' * (batch > 1)}")
        axes.set(xlabel="context, tokens", ylabel="seconds a prompt" if part == "prefill" else "ms a step", title=part)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100, format="png")


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("measured", type=Path, help="what ring-mlx bench --csv wrote")
    parser.add_argument("--shape", default="mini", help="mini or flash (mini)")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    args = parser.parse_args()
    args.bits = 4
    report(args, table(args.measured, args.shape), args.measured.name)
    if args.plot is not None:
        plot(args.measured, args.shape, args.plot)


if __name__ == "__main__":
    main()
