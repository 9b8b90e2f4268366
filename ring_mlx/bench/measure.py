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
    timer = _Timer(ours, other, settings, ranks, progress)
    for batch in settings.batch_sizes:
        for context in settings.contexts or ():
            key = mx.random.key(settings.seed + context)
            prompt = mx.random.randint(0, vocabulary, (batch, context), dtype=mx.int32, key=key)
            mx.eval(prompt)
            cells = [Cell(e.name, batch, context) for e in (ours, other) if e is not None]
            for repeat in range(settings.repeats + 1):
                timer.said = f"{batch} x {context:,} tokens, " + (f"run {repeat}" if repeat else "warm-up")
                for cell, run in zip(cells, timer.round(prompt, repeat), strict=False):
                    cell.runs += [run] * bool(repeat)
            yield cells


class _Timer:
    """Times runs and reports progress: reading and answering have their own speeds in each engine."""

    def __init__(
        self, ours: Engine, other: Engine | None, settings: BenchConfig, ranks: Ranks, progress: Progress | None
    ) -> None:
        self._ours, self._other, self._settings, self._ranks = ours, other, settings, ranks
        self.said, self._done, self._progress = "", 0, progress
        cells = [(batch, context) for batch in settings.batch_sizes for context in settings.contexts or ()]
        runs = settings.repeats + 1
        self._runs = runs * len(cells)
        work = {f"{ours.name} reads": runs * sum(b * c for b, c in cells)}
        work[f"{ours.name} answers"] = runs * len(cells) * settings.generate
        if other is not None:
            runs = min(runs, settings.vs_repeats + 1)
            alone = runs * sum(b * c for b, c in cells if self._reads_itself(c))
            work |= {f"{other.name} reads": alone, f"{other.name} answers": runs * len(cells) * settings.generate}
            work[f"{ours.name} reads"] += runs * sum(b * c for b, c in cells) - alone
        self._time_left = TimeLeft(**work)

    def round(self, prompt: mx.array, repeat: int) -> list[Run]:
        """A run of each engine, of mlx-lm's in its repetitions only."""
        found, other = [self._run(self._ours, prompt)], self._other
        if other is not None and repeat <= self._settings.vs_repeats:
            # Where mlx-lm's token-by-token prefill would take minutes, it decodes after a prompt that ours read.
            cache = None
            if not self._reads_itself(prompt.shape[1]):
                cache = seeded_cache(self._ours, other, prompt[:, :-1], self._settings.prefill_step_size)
                self._did(self._ours, "reads", prompt.size)
            found.append(self._run(other, prompt if cache is None else prompt[:, -1:], cache))
        self._done += 1
        self._tell()
        return found

    def _reads_itself(self, context: int) -> bool:
        """Whether mlx-lm reads so long a prompt."""
        return context <= max(1, self._settings.vs_max_prefill)

    def _run(self, engine: Engine, prompt: mx.array, cache: Any | None = None) -> Run:
        settings, is_seeded = self._settings, cache is not None
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        started = first = time.perf_counter()
        cache = engine.make_cache() if cache is None else cache
        for n, _ in enumerate(engine.tokens(prompt, cache, settings.generate + 1, settings.prefill_step_size)):
            if n == 0:
                first = time.perf_counter()
                self._did(engine, "reads", prompt.size * (not is_seeded))
        decode_s = time.perf_counter() - first
        mx.synchronize()
        self._did(engine, "answers", settings.generate)
        peak = self._ranks.greatest(mx.get_peak_memory()) if engine is self._ours else mx.get_peak_memory()
        tps = settings.generate * prompt.shape[0] / max(decode_s, 1e-9)
        return Run(None if is_seeded else first - started, tps, peak)

    def _did(self, engine: Engine, kind: str, amount: int) -> None:
        self._time_left.did(f"{engine.name} {kind}", amount)
        self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(self._done, self._runs, self.said, self._time_left.left_s())


def spread(values: list[float]) -> tuple[float, float, float] | None:
    """Median, least and greatest; None of nothing."""
    return (statistics.median(values), min(values), max(values)) if values else None


def seconds(call: Callable[[], Any]) -> float:
    """Of a call's result."""
    mx.synchronize()
    started = time.perf_counter()
    mx.eval(call())
    mx.synchronize()
    return time.perf_counter() - started


def best_s(call: Callable[[], mx.array], repeats: int = 5) -> float:
    """The least time of a call after a warm-up: what the machine can do."""
    return min([seconds(call) for _ in range(repeats + 1)][1:])
