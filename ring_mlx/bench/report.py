"""Measured cells as rows, and rows as text, CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ring_mlx.bench.config import BenchError
from ring_mlx.bench.engines import OURS
from ring_mlx.bench.floor import Floor
from ring_mlx.bench.measure import Cell, spread
from ring_mlx.system.files import is_stream

Row = dict[str, Any]
Column = tuple[str, int, Callable[[Row], str]]
PARTS = ("median", "min", "max")
MEASURES = ("prefill_tps", "decode_tps", "first_token_s")
NUMBERS = [f"{m}_{p}" for m in MEASURES for p in PARTS]
SHARES = ("prefill_floor_tps", "prefill_floor_share", "decode_floor_tps", "decode_floor_share")
RATIOS = ("prefill_ratio", "decode_ratio")
FLOOR_PARTS = ("prefill_operations_per_token", "decode_bytes_per_step")
CELL_COLUMNS = ["engine", "batch", "context", "generated", "prefill_step", "runs", *NUMBERS, "peak_gb"]
CELL_COLUMNS += [*RATIOS, *SHARES, *FLOOR_PARTS, "dispatches"]


def rows_of(cells: Sequence[Cell], floor: Floor | None, dispatches: dict[str, int], settings: Any) -> list[Row]:
    """One row an engine; the first cell is ours, and its ratios are over the second's medians."""
    rows = []
    for cell in cells:
        row: Row = dict.fromkeys(CELL_COLUMNS)
        row |= {"engine": cell.engine, "batch": cell.batch, "context": cell.context, "runs": len(cell.runs)}
        row |= {"generated": settings.generate, "prefill_step": settings.prefill_step_size}
        for measure in MEASURES:
            for part, value in zip(PARTS, spread(getattr(cell, measure)()) or (None,) * 3, strict=True):
                row[f"{measure}_{part}"] = value
        row["peak_gb"] = cell.peak_bytes() / 1e9
        row["dispatches"] = dispatches.get(cell.engine) if cell.batch == 1 else None
        if floor is not None and cell.engine == OURS:
            row |= {k: v for k, v in asdict(floor).items() if k in FLOOR_PARTS}
            for name, limit in (("prefill", floor.prefill_tps), ("decode", floor.decode_tps)):
                row |= {f"{name}_floor_tps": limit, f"{name}_floor_share": row[f"{name}_tps_median"] / limit}
        rows.append(row)
    if len(rows) == 2:
        for name in ("prefill", "decode"):
            mine, other = (r[f"{name}_tps_median"] for r in rows)
            rows[0][f"{name}_ratio"] = mine / other if mine and other else None
    return rows


def columns(vs: bool, floor: bool) -> list[Column]:
    """Headings of the table with the least width of each, and what it shows of a row."""
    chosen: list[Column] = [
        ("engine", 8, lambda r: r["engine"]),
        ("batch", 5, lambda r: str(r["batch"])),
        ("context", 7, lambda r: f"{r['context']:,}"),
        ("prefill tok/s (min-max)", 24, lambda r: _spread(r, "prefill_tps")),
        ("decode tok/s (min-max)", 24, lambda r: _spread(r, "decode_tps")),
        ("first token s", 13, lambda r: _number(r["first_token_s_median"])),
        ("peak GB", 7, lambda r: f"{r['peak_gb']:.2f}"),
    ]
    for name in ("prefill", "decode") if vs else ():
        chosen.append((f"{name} / mlx-lm", 15, partial(_optional, f"{name}_ratio", "{:.2f}x")))
    for name in ("prefill", "decode") if floor else ():
        chosen.append((f"{name} of floor", 16, partial(_optional, f"{name}_floor_share", "{:.1%}")))
    return chosen


def text_lines(chosen: Sequence[Column], rows: Sequence[Row] | None) -> str:
    """Lines of an aligned table: of the rows, or of the headings if there are none."""
    shown = [[h for h, _, _ in chosen]] if rows is None else [[show(r) for _, _, show in chosen] for r in rows]
    widths = [max(width, len(heading)) for heading, width, _ in chosen]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in shown)


def markdown_table(chosen: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[heading for heading, _, _ in chosen], ["---"] * len(chosen)]
    lines += [[show(r) for _, _, show in chosen] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table(counts: dict[str, dict[str, int]]) -> str:
    """Primitives of a decode step, the commonest first, one column an engine."""
    engines = list(counts)
    names = sorted(
        {n for c in counts.values() for n in c}, key=lambda n: (-max(c.get(n, 0) for c in counts.values()), n)
    )
    width = max(len(n) for n in (*names, "dispatches a decode step"))
    lines = [f"{'dispatches a decode step':{width}}" + "".join(f"{e:>10}" for e in engines)]
    lines += [f"{n:{width}}" + "".join(f"{counts[e].get(n, 0):10d}" for e in engines) for n in names]
    lines.append(f"{'all':{width}}" + "".join(f"{sum(counts[e].values()):10d}" for e in engines))
    return "\n".join(lines)


def check_csv(path: Path, needed: Sequence[str], columns: Sequence[str]) -> None:
    """Raises BenchError if the file lacks a column that is needed, or has others than ``columns``."""
    header = _csv_header(path)
    missing = [c for c in needed if c not in header]
    if header and (missing or [c for c in columns if c in header] != header):
        lacks = f" (it lacks {', '.join(missing)})" if 0 < len(missing) < 4 else ""
        raise BenchError(f"{path} has other columns than this run writes{lacks}; name another file for --csv.")


def append_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Append rows, with a header if the file is new, else under its own: one file can hold all runs of a machine.

    Raises BenchError if they do not fit on the disk; no part of them is in the file then.
    """
    text, header = io.StringIO(), _csv_header(path)
    columns = header or columns
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not header:
        writer.writeheader()
    writer.writerows({c: _rounded(row.get(c)) for c in columns} for row in rows)
    data = text.getvalue().encode()
    if header and not path.read_bytes().endswith(b"\n"):
        data = b"\n" + data
    with path.open("ab", buffering=0) as f:
        size = 0 if is_stream(path) else os.fstat(f.fileno()).st_size
        try:
            if f.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            with suppress(OSError):
                f.truncate(size)
            raise BenchError(f"{path} could not be written ({e.strerror}); check space and permissions.") from None


def json_text(head: Row, rows: Sequence[Row], counts: dict[str, dict[str, int]], experts: Row | None = None) -> str:
    cells = [{k: _rounded(v) for k, v in row.items() if k not in head} for row in rows]
    read = {"experts": experts} if experts is not None else {}
    return json.dumps(head | {"cells": cells, "primitives": counts} | read, indent=1) + "\n"


def _csv_header(path: Path) -> list[str]:
    """The file's columns; none of a new or empty one."""
    if not path.exists() or not path.stat().st_size:
        return []
    try:
        with path.open(encoding="utf-8", newline="") as f:
            return next(csv.reader(f), []) or [""]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BenchError(f"{path} cannot be read ({e}); name another file for --csv.") from None


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _spread(row: Row, measure: str) -> str:
    middle, low, high = (row[f"{measure}_{p}"] for p in PARTS)
    return "-" if middle is None else f"{_number(middle)} ({_number(low)}-{_number(high)})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _optional(key: str, pattern: str, row: Row) -> str:
    return "-" if row[key] is None else pattern.format(row[key])
