"""Finds the fastest of several ways to do the same work, beyond the noise.

The rule. All ways are run in turn, forwards and backwards, so that what warms up or slows down meets all of them. Of each
way the median counts, and the default stays unless another way is ahead of it by more than the noise:

    median(default) - median(way) > 4 standard errors of their differences run by run (1.86 MAD / sqrt(runs))

and by at least 1 % of the work, MLX's own operation by any difference beyond the noise. Nothing is chosen that is slower
than MLX's own operation, or that was not timed beside it.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from metal_kernels.choices import MLX, Value

Run = Callable[[int], object]  # does the work so many times and waits for it
Clock = Callable[[], float]

ROUNDS, LEAST_ROUNDS = 12, 5
SAMPLE_S = 0.01  # of a run that is shorter, several make one sample
MOST_REPEATS = 20
HOPELESS = 3.0  # times the default's time, at which a way is not timed further
STANDARD_ERRORS, LEAST_GAIN = 4.0, 0.01
SLOW, NO_TIME = "three times as slow", "no time left"


class Budget:
    """A number of seconds, which pass while anything runs."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self._ends = clock() + seconds

    def left_s(self) -> float:
        """Seconds left; negative after the end."""
        return self._ends - self.clock()

    def part(self, seconds: float) -> Budget:
        """A budget of at most so many of the seconds left."""
        return Budget(max(0.0, min(seconds, self.left_s())), self.clock)


@dataclass
class Verdict:
    """The result of one choice: the median seconds of each way that was timed to the end, and why others are out."""

    name: str
    default: Value
    chosen: Value
    seconds: dict[Value, float] = field(default_factory=dict)
    out: dict[Value, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """The saved share of the default's time."""
        default = self.seconds.get(self.default)
        return 0.0 if default is None or self.chosen == self.default else 1 - self.seconds[self.chosen] / default

    def as_dict(self) -> dict[str, Any]:
        """As JSON, whose keys are text."""
        found = asdict(self) | {"gain": self.gain}
        return {k: {str(x): y for x, y in v.items()} if isinstance(v, dict) else v for k, v in found.items()}


def race(name: str, runs: Mapping[Value, Run], default: Value, budget: Budget) -> Verdict:
    """Time the ways to do one thing and choose; the default stays where none is faster.

    The budget is spent up to its end at most, but for one call: what a way takes is known after its first, which may
    be slow, since it compiles.
    """
    verdict = Verdict(name, default, default)
    once = _first_runs(runs, verdict, budget)
    if default not in once or len(once) < 2:
        return verdict
    samples = _samples(runs, once, verdict, budget)
    if samples:
        verdict.seconds |= {value: statistics.median(times) for value, times in samples.items()}
        verdict.chosen = _fastest(samples, default)
    else:
        verdict.out |= {value: NO_TIME for value in once if value != default}
    return verdict


def _first_runs(runs: Mapping[Value, Run], verdict: Verdict, budget: Budget) -> dict[Value, float]:
    """Seconds of a run of each way, once it is warm.

    The default comes first and MLX second, so that these two are timed before the others.
    """
    order = sorted(runs, key=lambda value: (value != verdict.default, value != MLX))
    once: dict[Value, float] = {}
    slowest_first_s = 0.0
    for value in order:
        # A first run, and the least rounds of all so far and of this one.
        rounds_s = LEAST_ROUNDS * (sum(once.values()) + once.get(verdict.default, 0.0))
        if budget.left_s() <= slowest_first_s + rounds_s:
            verdict.out[value] = NO_TIME
            continue
        try:
            first = seconds(runs[value], budget.clock)
            slowest_first_s = max(slowest_first_s, first)
            limit = HOPELESS * once.get(verdict.default, math.inf)
            if first > budget.left_s():
                verdict.out[value] = NO_TIME
                continue
            took = seconds(runs[value], budget.clock)
        except Exception as e:  # noqa: BLE001 whatever a compiler or a driver raises
            verdict.out[value] = said(e)
            if value == verdict.default:
                break
            continue
        if took > limit:
            verdict.out[value] = SLOW
        else:
            once[value] = took
    return once


def said(error: Exception) -> str:
    """An error in one line, without the paths of this machine."""
    return re.sub(r"\S*/\S*", "...", " ".join(str(error).split()))[:200] or type(error).__name__


def _samples(
    runs: Mapping[Value, Run], once: dict[Value, float], verdict: Verdict, budget: Budget
) -> dict[Value, list[float]]:
    """Seconds a run of each way, sample by sample; empty where there is no time for `LEAST_ROUNDS` of two ways."""
    repeats = min(MOST_REPEATS, max(1, math.ceil(SAMPLE_S / max(once[verdict.default], 1e-9))))
    if LEAST_ROUNDS * repeats * sum(once.values()) > budget.left_s():
        repeats = 1
    for value in reversed(list(once)):
        if value != verdict.default and LEAST_ROUNDS * repeats * sum(once.values()) > budget.left_s():
            verdict.out[value] = NO_TIME
            del once[value]
    samples: dict[Value, list[float]] = {value: [] for value in once}
    if len(samples) < 2:
        return {}
    for round_ in range(ROUNDS):
        needed = repeats * sum(once[v] for v in samples)
        if needed > budget.left_s():
            break
        for value in list(samples) if round_ % 2 else reversed(list(samples)):
            samples[value].append(seconds(runs[value], budget.clock, repeats))
        if round_ + 1 == LEAST_ROUNDS:
            _drop_losers(samples, verdict)
            if len(samples) < 2:
                break
    return samples if min(map(len, samples.values())) >= LEAST_ROUNDS else {}


def _drop_losers(samples: dict[Value, list[float]], verdict: Verdict) -> None:
    """Stop timing ways that are behind the default; their medians so far are kept."""
    default = statistics.median(samples[verdict.default])
    for value in [v for v in samples if v != verdict.default]:
        if statistics.median(samples[value]) > default:
            verdict.seconds[value] = statistics.median(samples.pop(value))


def _fastest(samples: Mapping[Value, list[float]], default: Value) -> Value:
    """The way ahead of the default beyond the noise whose median is the least, and not behind MLX's; else the default."""
    median = {value: statistics.median(times) for value, times in samples.items()}
    ahead = [v for v in samples if v != default and is_ahead(samples[v], samples[default], v == MLX)]
    best = min(ahead, key=lambda v: median[v], default=default)
    return default if median[best] > median.get(MLX, math.inf) else best


def is_ahead(times: list[float], defaults: list[float], is_mlx: bool = False) -> bool:
    """Whether these are shorter beyond the noise than the default's in the same rounds."""
    differences = [d - t for d, t in zip(defaults, times, strict=True)]
    middle = statistics.median(differences)
    deviation = statistics.median(abs(d - middle) for d in differences)
    gain = statistics.median(defaults) - statistics.median(times)
    noise = STANDARD_ERRORS * 1.86 * deviation / math.sqrt(len(differences))
    return gain > noise and (is_mlx or gain >= LEAST_GAIN * statistics.median(defaults))


def seconds(run: Run, clock: Clock, repeats: int = 1) -> float:
    """Of one of so many runs together."""
    began = clock()
    run(repeats)
    return (clock() - began) / repeats
