"""What the scripts share: arguments, timing in alternation, and one report of their rows."""

from __future__ import annotations

import argparse
import re
import resource
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ring_mlx import demo_model_path
from ring_mlx.bench.machine import describe
from ring_mlx.bench.measure import spread
from ring_mlx.bench.random_weights import random_model
from ring_mlx.bench.report import append_csv, json_text, markdown_table, text_lines
from ring_mlx.bench.shapes import SHAPES
from ring_mlx.model.model import Model
from ring_mlx.options import counts, positive_int

__all__ = ["alternate", "arguments", "counts", "random", "report", "resident_peak_bytes", "slow_end"]


def arguments(
    doc: str | None, *, shape: str = "", bits: int = 4, model: bool = False, repeats: int = 0
) -> argparse.ArgumentParser:
    """A parser with what several scripts take.

    Args:
        doc: The script's own, whose first line is shown.
        shape: By default; random weights with ``bits``, 0 for none. Empty takes no shape.
        model: Whether a checkpoint is taken.
        repeats: By default, after one warm-up; 0 takes none.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if shape:
        parser.add_argument("--shape", choices=tuple(SHAPES), default=shape, help=f"of random weights ({shape})")
        parser.add_argument("--bits", type=int, default=bits, help=f"of the weights, 0 for none ({bits})")
        parser.add_argument("--layers", type=positive_int, help="so many instead of the shape's own")
    if model:
        parser.add_argument("--model", default=str(demo_model_path()), help="a folder (the packaged toy)")
    if repeats:
        parser.add_argument("-n", "--repeats", type=positive_int, default=repeats, help=f"after a warm-up ({repeats})")
    for kind in ("csv", "json", "markdown"):
        parser.add_argument(f"--{kind}", type=Path, help="file to append to" if kind == "csv" else "file to write")
    return parser


def random(args: argparse.Namespace) -> Model:
    """The model with random weights that the arguments name."""
    return random_model(args.shape, args.bits or None, layers=args.layers)


def alternate(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """What each way returns in each round, of which every second goes backwards; a first round is thrown away."""
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for n in range(repeats + 1):
        for name in ways if n % 2 else reversed(ways):
            result = ways[name]()
            found[name] += [result] * bool(n)
    return found


def report(args: argparse.Namespace, rows: Iterable[Mapping[str, Any]], *about: object) -> list[dict[str, Any]]:
    """Print what was measured on what, and each row as it comes, and write them to the files that were asked for.

    Args:
        args: From a parser of `arguments`.
        rows: Of the same names; a list is shown as its median with the least and the greatest.
        about: Words on what is measured.
    """
    machine = describe()
    given = [args.shape, f"{args.bits or 'no'} bits"] if "shape" in args else []
    said = ", ".join([machine["device"], f"mlx {machine['mlx']}", *map(str, (*given, *about))])
    print(said, flush=True)
    made: list[dict[str, Any]] = []
    for row in rows:
        columns = [(n, 24 if isinstance(v, list) else 9, lambda r, n=n: shown(r[n])) for n, v in row.items()]
        print(*([] if made else [text_lines(columns, None)]), text_lines(columns, [row]), sep="\n", flush=True)
        made.append(dict(row))
        if args.csv:
            flat = {"device": machine["device"], "mlx": machine["mlx"], "about": said} | flattened(row)
            append_csv(args.csv, list(flat), [flat])
    if args.json:
        args.json.write_text(json_text(machine | {"about": said}, [flattened(r) for r in made], {}), encoding="utf-8")
    if args.markdown and made:
        args.markdown.write_text(f"{said}\n\n{markdown_table(columns, made)}\n", encoding="utf-8")
    return made


def shown(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, list):
        middle, least, greatest = (shown(v) for v in spread(value) or (None,) * 3)
        return f"{middle} ({least} to {greatest})" if value else "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for files: a list as three numbers."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            out |= zip((f"{name} median", f"{name} min", f"{name} max"), spread(value) or (None,) * 3, strict=True)
        else:
            out[name] = value
    return out


def slow_end(times_s: Iterable[float], unit: float = 1.0) -> dict[str, float]:
    """Columns of the median, the slowest of twenty and the slowest."""
    times = sorted(t * unit for t in times_s)
    return {"median": statistics.median(times), "p95": times[int(0.95 * (len(times) - 1))], "max": times[-1]}


def resident_peak_bytes() -> int:
    """Of this process; on Linux ru_maxrss would count what its parent held when it was started."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
