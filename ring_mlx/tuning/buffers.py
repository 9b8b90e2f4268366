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
from ring_mlx.pace import Progress
from ring_mlx.tuning.race import NO_TIME, Budget, Verdict, is_ahead, said

OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
NAME, KEY = "operations a command buffer", "command buffers"
AS_MLX = "MLX's own"
VALUES: tuple[Value, ...] = (AS_MLX, 25, 50, 100, 200, 500)
UNLIMITED_MB = "1000000"
SECONDS = 60.0
ROUNDS = 2
# What a step must win in each round, and a prompt may lose.
LEAST_GAIN, MOST_LOSS = 0.03, 0.02
Timed = dict[str, list[float]]
Child = Callable[[Value], Timed]


def settings_of(value: Value) -> dict[str, str]:
    """The environment that gives so many operations a buffer; none for MLX's own number."""
    return {} if value == AS_MLX else {OPS: str(value), MB: UNLIMITED_MB}


def is_set() -> bool:
    """Whether the user said how long a command buffer is."""
    return OPS in os.environ or MB in os.environ


def choose(child: Child, budget: Budget, progress: Progress | None = None) -> Verdict:
    """Run every number in turn, twice, as far as the seconds go.

    Args:
        child: Times steps and prompts in a new process with a number of operations; may raise what a process can.
        budget: A process is not begun where the longest so far would not fit into it.
        progress: Called with (processes done, all, what is timed).
    """
    verdict = Verdict(NAME, AS_MLX, AS_MLX)
    found: dict[Value, list[Timed]] = {value: [] for value in VALUES}
    longest, total = 0.0, ROUNDS * len(VALUES)
    for done, value in enumerate([*VALUES, AS_MLX, *reversed(VALUES[1:])]):
        if value in verdict.out:
            continue
        if progress:
            progress(done, total, f"timing {NAME}: {value}")
        began = budget.clock()
        if longest > budget.left_s():
            verdict.out[value] = NO_TIME
            continue
        try:
            found[value].append(child(value))
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            verdict.out[value] = said(e)
        longest = max(longest, budget.clock() - began)
    if progress:
        progress(total, total)
    whole = {v: times for v, times in found.items() if len(times) == ROUNDS and v not in verdict.out}
    if AS_MLX in whole:
        verdict.seconds = {v: statistics.median(t for one in times for t in one["step"]) for v, times in whole.items()}
        better = [v for v in whole if v != AS_MLX and _is_better(whole[v], whole[AS_MLX])]
        verdict.chosen = min(better, key=lambda v: verdict.seconds[v], default=AS_MLX)
    return verdict


def _is_better(found: list[Timed], mlx: list[Timed]) -> bool:
    """Whether steps are shorter in each round beyond the noise, and prompts not longer."""
    for ours, theirs in zip(found, mlx, strict=True):
        if statistics.median(ours["step"]) > (1 - LEAST_GAIN) * statistics.median(theirs["step"]):
            return False
        if statistics.median(ours["prompt"]) > (1 + MOST_LOSS) * statistics.median(theirs["prompt"]):
            return False
    return is_ahead([t for one in found for t in one["step"]], [t for one in mlx for t in one["step"]])


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
