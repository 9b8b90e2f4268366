"""Operations a command buffer, which MLX reads once, when it makes its device: each number is timed in its own process.

MLX ends a command buffer (on CUDA a graph) after ``MLX_MAX_OPS_PER_BUFFER`` operations, or once the arrays that they read
reach ``MLX_MAX_MB_PER_BUFFER``. Of a layer's experts it counts all, though a token reads few, so on a Mac two layers of
Ring-mini end a buffer whatever the number of operations is. Here the operations alone are to end one.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata

from metal_kernels import choices, machine
from metal_kernels.choices import Value
from ring_mlx.system.progress import Progress
from ring_mlx.tuning.race import NO_TIME, Budget, Verdict, is_ahead, said

OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
NAME, KEY = "operations a command buffer", "command buffers"
AS_MLX = "MLX's own"
VALUES: tuple[Value, ...] = (AS_MLX, 25, 50, 100, 200, 500)
UNLIMITED_MB = "1000000"
SECONDS = 60.0
# What a step must win in each round, and a prompt may lose.
LEAST_GAIN, MOST_LOSS = 0.03, 0.02
Timed = dict[str, list[float]]
Child = Callable[[Value], Timed]


def settings_of(value: Value) -> dict[str, str]:
    """The environment that gives so many operations a buffer; none for MLX's own number."""
    return {} if value == AS_MLX else {OPS: str(value), MB: UNLIMITED_MB}


def is_set() -> bool:
    return OPS in os.environ or MB in os.environ


def choose(child: Child, budget: Budget, progress: Progress | None = None) -> Verdict:
    """Run every number once, and those that were faster than MLX's own once more beside it, as far as the seconds go.

    ``child`` times steps and prompts in a new process, which is not begun where the longest so far would not fit.
    """
    turns = _Turns(child, budget, progress)
    for value in VALUES:
        turns.take(value, kept_free=2 if value != AS_MLX else 0)
    first, found = turns.found.get(AS_MLX), turns.found
    better = [v for v in found if v != AS_MLX and first and _is_shorter(found[v][0], first[0])]
    better.sort(key=lambda v: statistics.median(found[v][0]["step"]))
    for value in [AS_MLX, *better] if better else []:
        turns.take(value)
    if progress:
        progress(1, 1)
    seconds = {v: statistics.median(t for one in times for t in one["step"]) for v, times in found.items()}
    both = {v: times for v, times in found.items() if len(times) == 2}
    sure = [v for v in better if v in both and AS_MLX in both and _is_better(both[v], both[AS_MLX])]
    return Verdict(NAME, AS_MLX, min(sure, key=lambda v: seconds[v], default=AS_MLX), seconds, turns.out)


class _Turns:
    """Processes one after the other, as long as there is time for one as long as the longest."""

    def __init__(self, child: Child, budget: Budget, progress: Progress | None) -> None:
        self._child, self._budget, self._progress = child, budget, progress
        self._longest_s, self._done = 0.0, 0
        self.found: dict[Value, list[Timed]] = {}
        self.out: dict[Value, str] = {}

    def take(self, value: Value, kept_free: int = 0) -> None:
        """Time one number, unless there would be no time for it and so many more processes then."""
        if self._progress:
            self._progress(self._done, 2 * len(VALUES), f"timing {NAME}: {value}", self._budget.left_s())
        self._done += 1
        began = self._budget.clock()
        if self._longest_s * (1 + kept_free) > self._budget.left_s():
            self.out[value] = NO_TIME
            return
        try:
            self.found.setdefault(value, []).append(self._child(value))
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            self.out[value] = said(e)
            self.found.pop(value)
        self._longest_s = max(self._longest_s, self._budget.clock() - began)


def _is_shorter(ours: Timed, theirs: Timed) -> bool:
    """Whether steps are, in one process each, and prompts not longer."""
    return statistics.median(ours["step"]) <= (1 - LEAST_GAIN) * statistics.median(theirs["step"]) and (
        statistics.median(ours["prompt"]) <= (1 + MOST_LOSS) * statistics.median(theirs["prompt"])
    )


def _is_better(found: list[Timed], mlx: list[Timed]) -> bool:
    """Whether steps are shorter in each turn and beyond the noise."""
    steps, of_mlx = ([t for one in times for t in one["step"]] for times in (found, mlx))
    return all(map(_is_shorter, found, mlx)) and is_ahead(steps, of_mlx)


def keep(verdict: Verdict, backend: str) -> None:
    """Keep what was chosen, for `use_stored`."""
    entry = {"chosen": verdict.chosen, "seconds": {str(v): s for v, s in verdict.seconds.items()}}
    machine.store(backend).put(machine.CHOICES, {KEY: entry})


def use_stored() -> None:
    """Give this process the number chosen on this machine, before MLX makes its device; not where the user gave one.

    What identifies the machine to the last is known only to the device, so nothing is used where the files of two fit.
    """
    if choices.is_off() or is_set():
        return
    fitting = [entry for identity, entry in machine.peek(machine.CHOICES, KEY) if _may_be_here(identity)]
    if len(fitting) == 1 and fitting[0].get("chosen") in VALUES:
        os.environ.update(settings_of(fitting[0]["chosen"]))


def _may_be_here(identity: Mapping[str, str]) -> bool:
    mac = platform.mac_ver()[0]
    here = {
        "os": f"{'macOS' if mac else platform.system()} {mac or platform.release()}",
        "build": platform.version(),
        "mlx": metadata.version("mlx"),
    }
    return all(identity.get(name) == value for name, value in here.items())
