"""One benchmark from the model to the files."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.bench import dispatches, machine, report
from ring_mlx.bench.config import ALONE, BenchConfig, BenchError, Ranks
from ring_mlx.bench.engines import OURS, Engine, theirs
from ring_mlx.bench.floor import Rates, floor, measure_rates
from ring_mlx.bench.measure import measure
from ring_mlx.bench.plot import check_plot, plot
from ring_mlx.generation.decoding import prefill_step_or_default
from ring_mlx.model import memory
from ring_mlx.model.model import Model
from ring_mlx.system.files import Write, check_named, write_named
from ring_mlx.system.progress import Progress
from ring_mlx.system.wired import Wired

Head = dict[str, Any]
HEAD = ("date", "device", "backend", "kernels", "ring_mlx", "mlx", "mlx_lm", "python", "system")
MODEL = ("model", "layers", "weights_gb", "build_peak_gb", "bandwidth_gbps", "matmul_tflops")
# Of later versions: at the end, so that files of earlier ones can be appended to where a run leaves these empty.
LATER = ("ranks", "distributed", "expert_cache_gb")
COLUMNS = [*HEAD, *MODEL, *report.CELL_COLUMNS, *LATER]


@dataclass(frozen=True)
class Files:
    """Where results go besides the terminal."""

    csv: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self, later: Collection[str] = ()) -> None:
        """Raises BenchError, before anything is measured, where a file could not be written; ``later`` of `LATER` are."""
        for path in (self.csv, self.json, self.markdown, self.plot):
            if path is not None:
                _check_place(path)
        if self.csv is not None:
            report.check_csv(self.csv, [c for c in COLUMNS if c not in LATER or c in later], COLUMNS)
        if self.plot is not None:
            check_plot()


@dataclass
class Result:
    """The result: machine, one row a cell and engine, primitives of a decode step by engine, reads of experts."""

    head: Head
    columns: list[report.Column]
    rows: list[report.Row] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    experts: dict[str, Any] | None = None


def bench(
    make: Callable[[], tuple[Model, dict[str, Any], str]],
    settings: BenchConfig,
    files: Files,
    *,
    ops: bool = False,
    expert_cache_bytes: int | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Result:
    """Build the model, measure every cell, print and append each at once, and write the other files at the end.

    Args:
        make: Gives the model, its config.json and what to call it.
        ops: Also count the dispatches of a decode step.
        expert_cache_bytes: What the model reads its routed experts into, for the report.
        ranks: The processes that call this with the same settings; one of them has files.

    Raises:
        BenchError: If the settings do not suit the model or the machine, or a file cannot be written.
        RingError: As ``make``.
    """
    with ranks.together():
        files.check([*LATER[:2] * (ranks.count > 1), *LATER[2:] * (expert_cache_bytes is not None)])
    try:
        rates = measure_rates() if settings.floor else None
        mx.reset_peak_memory()
        model, raw, name = make()
        step = prefill_step_or_default(settings.prefill_step_size or None)
        settings = replace(settings.fitted(model.config.context_tokens), prefill_step_size=step)
        with ranks.together():
            _check_caches(model, settings)
        head = _head(model, name + ranks.words(), rates, ranks)
        head["expert_cache_gb"] = expert_cache_bytes / 1e9 if expert_cache_bytes is not None else None
        result = Result(head, report.columns(settings.vs, settings.floor))
        say(heading(result.head))
        try:
            with Wired():
                _measure(model, raw, settings, files, result, rates, ops, ranks, say, progress)
        finally:
            write(result, files)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise BenchError(f"a file could not be read or written ({e}); check space and permissions.") from None
    except (RuntimeError, MemoryError, OverflowError) as e:
        if ranks.count > 1 and str(e).startswith("["):
            raise  # more likely a process that is gone, of which the caller knows more
        words = " ".join(str(e).split())[:300] or type(e).__name__
        raise BenchError(f"MLX gave up ({words}); try shorter contexts, fewer rows or a smaller model.") from None
    return result


def _check_place(path: Path) -> None:
    try:
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
        check_named(path)
    except (OSError, ValueError) as e:
        raise BenchError(f"{path} cannot be written ({e}); name a file in a folder that exists and is yours.") from None


def _check_caches(model: Model, settings: BenchConfig) -> None:
    """Raises BenchError where the largest cell's cache alone would not fit beside the weights."""
    rows, tokens = max(settings.batch_sizes), max(settings.contexts or (0,)) + settings.generate
    needed = rows * memory.cache_bytes(model.config, tokens) + mx.get_active_memory()
    limit = memory.budget_bytes()
    if needed > limit:
        raise BenchError(
            f"{rows} rows of {tokens} tokens take {needed / 1e9:.1f} GB with the weights, but this machine can give "
            f"{limit / 1e9:.1f} GB; give fewer rows or tokens."
        )


def _measure(
    model: Model,
    raw: dict[str, Any],
    settings: BenchConfig,
    files: Files,
    result: Result,
    rates: Rates | None,
    ops: bool,
    ranks: Ranks,
    say: Callable[[str], None],
    progress: Progress | None,
) -> None:
    ours = Engine(OURS, model, ranks.agree)
    other = theirs(model, raw) if settings.vs else None
    vocabulary = model.config.vocab_size
    if ops:
        result.counts = {e.name: dict(dispatches.count_decode_step(e, vocabulary)) for e in (ours, other) if e}
        say(report.counts_table(result.counts))
    totals = {engine: sum(c.values()) for engine, c in result.counts.items()}
    say(report.text_lines(result.columns, None))
    for cells in measure(ours, other, settings, vocabulary, ranks, progress):
        limit = floor(model, rates, cells[0].batch, cells[0].context) if rates else None
        rows = [result.head | row for row in report.rows_of(cells, limit, totals, settings)]
        result.rows += rows
        say(report.text_lines(result.columns, rows))
        if files.csv is not None:
            report.append_csv(files.csv, COLUMNS, rows)
    experts = getattr(model, "expert_statistics", None)
    if experts is not None:
        result.experts = experts.as_dict()
        say(experts.line())


def heading(head: dict[str, Any]) -> str:
    size = f"{head['weights_gb']:.2f} GB (peak while loading {head['build_peak_gb']:.2f} GB)"
    versions = f"ring-mlx {head['ring_mlx']}, mlx {head['mlx']}, mlx-lm {head['mlx_lm']}, Python {head['python']}"
    lines = [
        f"{head['model']}: {size}",
        f"{head['device']} ({head['backend']}, kernels: {head['kernels']}), {versions}, {head['date']}",
    ]
    if head["bandwidth_gbps"] is not None:
        lines.append(f"measured: {head['bandwidth_gbps']:.1f} GB/s, {head['matmul_tflops']:.3g} TFLOP/s of products")
    return "\n".join(lines)


def write(result: Result, files: Files) -> None:
    """Write the files that hold a whole run, if a cell was measured; raises BenchError if some cannot be written."""
    if not result.rows:
        return
    title = heading(result.head)
    counted = f"\n\n```\n{report.counts_table(result.counts)}\n```" if result.counts else ""
    table = report.markdown_table(result.columns, result.rows)
    contents: dict[Path | None, str | Write] = {
        files.json: report.json_text(result.head, result.rows, result.counts, result.experts),
        files.markdown: title.replace("\n", "  \n") + f"\n\n{table}{counted}\n",
        files.plot: partial(plot, result.rows, title),
    }
    failed = []
    for path, content in contents.items():
        try:
            if path is not None:
                write_named(path, content)
        except OSError as e:
            failed.append(f"{path} ({e.strerror or e})")
    if failed:
        raise BenchError(f"{', '.join(failed)} could not be written; check space and permissions.")


def _head(model: Model, name: str, rates: Rates | None, ranks: Ranks) -> Head:
    return {
        **machine.describe(),
        "model": name,
        "layers": model.config.num_hidden_layers,
        "weights_gb": ranks.greatest(mx.get_active_memory()) / 1e9,
        "build_peak_gb": ranks.greatest(mx.get_peak_memory()) / 1e9,
        "bandwidth_gbps": rates and rates.bandwidth / 1e9,
        "matmul_tflops": rates and rates.matmul / 1e12,
        "ranks": ranks.count,
        "distributed": ranks.mode() or None,
    }
