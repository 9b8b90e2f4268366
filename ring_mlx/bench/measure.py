"""Times and memory of engines over contexts and batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ring_mlx.bench.config import ALONE, BenchConfig, Ranks
from ring_mlx.bench.engines import Engine, seeded_cache
from ring_mlx.system.progress import Progress, TimeLeft


@dataclass(frozen=True)
class Run:
    """One repetition: seconds to the first token (None where the prompt was not read), decode tok/s, peak bytes."""

    first_token_s: float | None
    decode_tps: float
    peak_bytes: int


@dataclass
class Cell:
    """All measured repetitions of one engine at one batch size and context."""

    engine: str
    batch: int
    context: int
    runs: list[Run] = field(default_factory=list)

    def first_token_s(self) -> list[float]:
        """Seconds to the first token of all rows; empty where the engine did not read the prompt."""
        return [r.first_token_s for r in self.runs if r.first_token_s is not None]

    def prefill_tps(self) -> list[float]:
        """Prompt tokens of all rows over the time to the first token."""
        return [self.batch * self.context / s for s in self.first_token_s()]

    def decode_tps(self) -> list[float]:
        """Tokens of all rows a second, after the first."""
        return [r.decode_tps for r in self.runs]

    def peak_bytes(self) -> int:
        """The highest peak of MLX's memory, weights included, of the process that took most."""
        return max(r.peak_bytes for r in self.runs)


def measure(
    ours: Engine,
    other: Engine | None,
    settings: BenchConfig,
    vocabulary: int,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Iterator[list[Cell]]:
    """The cells of every batch size and context: ours, then mlx-lm's if there is one, measured in alternation."""
    clock = _Clock(ours, other, settings, progress)
    for batch in settings.batch_sizes:
        for context in settings.contexts or ():
            key = mx.random.key(settings.seed + context)
            prompt = mx.random.randint(0, vocabulary, (batch, context), dtype=mx.int32, key=key)
            mx.eval(prompt)
            cells = [Cell(e.name, batch, context) for e in (ours, other) if e is not None]
            for repeat in range(settings.repeats + 1):
                clock.said = f"{batch} x {context:,} tokens, " + (f"run {repeat}" if repeat else "warm-up")
                found = [_run(ours, prompt, settings, clock, ranks=ranks)]
                if other is not None and repeat <= settings.vs_repeats:
                    found.append(_run_theirs(ours, other, prompt, settings, clock))
                clock.tell(1)
                if repeat:
                    for cell, run in zip(cells, found, strict=False):
                        cell.runs.append(run)
            yield cells


class _Clock:
    """Tells how far a benchmark is: reading and answering go at their own speeds in each engine."""

    def __init__(self, ours: Engine, other: Engine | None, settings: BenchConfig, progress: Progress | None) -> None:
        self.said, self._done, self._progress = "", 0, progress
        cells = [(batch, context) for batch in settings.batch_sizes for context in settings.contexts or ()]
        runs = settings.repeats + 1
        self._runs = runs * len(cells)
        work = {f"{ours.name} reads": runs * sum(b * c for b, c in cells)}
        work[f"{ours.name} answers"] = runs * len(cells) * settings.generate
        if other is not None:
            runs = min(runs, settings.vs_repeats + 1)
            alone = runs * sum(b * c for b, c in cells if _reads_itself(c, settings))
            work |= {f"{other.name} reads": alone, f"{other.name} answers": runs * len(cells) * settings.generate}
            work[f"{ours.name} reads"] += runs * sum(b * c for b, c in cells) - alone
        self._time_left = TimeLeft(**work)

    def did(self, engine: Engine, kind: str, amount: int) -> None:
        self._time_left.did(f"{engine.name} {kind}", amount)
        self.tell()

    def tell(self, runs: int = 0) -> None:
        self._done += runs
        if self._progress:
            self._progress(self._done, self._runs, self.said, self._time_left.left_s())


def _reads_itself(context: int, settings: BenchConfig) -> bool:
    """Whether mlx-lm reads so long a prompt."""
    return context <= max(1, settings.vs_max_prefill)


def _run_theirs(ours: Engine, other: Engine, prompt: mx.array, settings: BenchConfig, clock: _Clock) -> Run:
    """mlx-lm's run; where its token-by-token prefill would take minutes, it decodes after a prompt that ours read."""
    if _reads_itself(prompt.shape[1], settings):
        return _run(other, prompt, settings, clock)
    cache = seeded_cache(ours, other, prompt[:, :-1], settings.prefill_step_size)
    clock.did(ours, "reads", prompt.size)
    return _run(other, prompt[:, -1:], settings, clock, cache)


def _run(
    engine: Engine,
    prompt: mx.array,
    settings: BenchConfig,
    clock: _Clock,
    cache: Any | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    is_seeded = cache is not None
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    started = first = time.perf_counter()
    cache = engine.make_cache() if cache is None else cache
    tokens = engine.tokens(prompt, cache, settings.generate + 1, settings.prefill_step_size)
    for n, _ in enumerate(tokens):
        if n == 0:
            first = time.perf_counter()
            clock.did(engine, "reads", prompt.size * (not is_seeded))
    decode_s = time.perf_counter() - first
    mx.synchronize()
    clock.did(engine, "answers", settings.generate)
    peak = ranks.greatest(mx.get_peak_memory())
    tps = settings.generate * prompt.shape[0] / max(decode_s, 1e-9)
    return Run(None if is_seeded else first - started, tps, peak)


def spread(values: list[float]) -> tuple[float, float, float] | None:
    """Median, least and greatest; None of nothing."""
    return (statistics.median(values), min(values), max(values)) if values else None


def best_s(call: Callable[[], mx.array], repeats: int = 5) -> float:
    """The least time of a call after a warm-up: what the machine can do."""
    mx.eval(call())
    times = []
    for _ in range(repeats):
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(call())
        mx.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
