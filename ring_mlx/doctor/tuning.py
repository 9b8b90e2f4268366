"""This machine's choices of kernels and sizes: the kept ones, or new ones for ``doctor --tune``.

Run as a program with what names a model, it times that model's steps and prompts; the length of command buffers comes
from its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metal_kernels import choices, machine
from metal_kernels.choices import Value
from ring_mlx.bench.random_weights import random_model
from ring_mlx.checkpoint.loading import demo_model_path, load_model
from ring_mlx.doctor.finding import NOTE, OK, Finding
from ring_mlx.errors import OptionError
from ring_mlx.model.decode_step import COMPILED_ON
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress
from ring_mlx.tuning import autotune, buffers, race, workloads
from ring_mlx.tuning.autotune import Tuning, is_current
from ring_mlx.tuning.buffers import MB, OPS, Child, Timed, settings_of
from ring_mlx.tuning.race import Budget, Run

SECTION = "tuning"
STEPS, STEPS_A_SAMPLE, PROMPTS, TIMEOUT_S = 20, 8, 2, 60.0


def check() -> list[Finding]:
    """A line for each kind of model that was timed here; times nothing."""
    if choices.is_off():
        return [Finding(SECTION, "choices", NOTE, f"{choices.SWITCH}=off: the tables", f"unset {choices.SWITCH}")]
    where = choices.where()
    kept = machine.store(where).all(machine.CHOICES)
    found = [_of_a_model(where, entry) for entry in kept.values() if is_current(entry)]
    if buffers.KEY in kept:
        seen = str(kept[buffers.KEY].get("chosen"))
        found.append(Finding(SECTION, buffers.NAME, OK, seen, data=kept[buffers.KEY]))
    if found:
        return found
    when = "the first load of a model times them" if where in COMPILED_ON else "ring-mlx doctor --tune times them"
    return [Finding(SECTION, "choices", OK, f"the tables; {when}")]


def _of_a_model(where: str, entry: Mapping[str, Any]) -> Finding:
    chosen = choices.valid(entry.get("chosen"), where)
    said = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "the tables are the fastest"
    label, seconds, problem = (entry.get(key) for key in ("label", "seconds", "problem"))
    name = label if isinstance(label, str) else "a model"
    if problem:
        return Finding(SECTION, name, NOTE, f"the tables: {problem}", "ring-mlx doctor --tune", dict(entry))
    seen = f"{said}; timed in {seconds:.1f} s" if isinstance(seconds, float) else said
    return Finding(SECTION, name, OK, seen, data=dict(entry))


def tune(
    folder: Path | None, shape: str | None, seconds: float | None = None, progress: Progress | None = None
) -> Tuning:
    """Time every choice with a model, and keep what was found for models of the same shapes.

    Args:
        folder: A checkpoint; None is the packaged toy, but for ``shape``.
        shape: Random weights at these shapes instead.
        seconds: For all choices, `autotune.SECONDS` by default.
    """
    if choices.is_off():
        raise OptionError(f"{choices.SWITCH}=off keeps the tables; unset {choices.SWITCH}.")
    what = {"random": shape} if shape else {"folder": str(folder or demo_model_path())}
    model = model_of(what)
    tuning = autotune.tune(model, Budget(autotune.SECONDS if seconds is None else seconds), progress)
    autotune.keep(model, tuning)
    del model  # or there would be two in memory
    if tuning.backend in COMPILED_ON and not buffers.is_set():
        tuning.buffers = buffers.choose(in_a_process(what), Budget(buffers.SECONDS), progress)
        buffers.keep(tuning.buffers, tuning.backend)
    return tuning


def in_a_process(what: Mapping[str, Any]) -> Child:
    """A `Child` that makes the model which ``what`` names, as `model_of`, with the packages of this process."""

    def child(value: Value) -> Timed:
        environment = {k: v for k, v in os.environ.items() if k not in (OPS, MB)} | settings_of(value)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", "-m", "ring_mlx.doctor.tuning", json.dumps(what)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        found: Timed = json.loads(done.stdout.splitlines()[-1])
        return found

    return child


def model_of(what: Mapping[str, Any]) -> Model:
    """The model that ``what`` names; nothing is timed for it.

    It is {"folder": PATH}, or {"random": SHAPE} with "bits" (4, 0 for none) and "layers" if wanted.
    """
    with autotune.later():
        if "folder" in what:
            return load_model(what["folder"])
        bits = what.get("bits", 0 if what["random"] == "golden" else 4)
        model = random_model(what["random"], bits or None, layers=what.get("layers"))
        autotune.settle(model)
        return model


def times(what: Mapping[str, Any]) -> Timed:
    """Seconds of steps and prompts of a model, with the environment as it is."""
    model, now = model_of(what), choices.active()
    return {
        "step": _times(workloads.step(model, now, is_whole=True), STEPS, STEPS_A_SAMPLE),
        "prompt": _times(workloads.prompt(model, now), PROMPTS),
    }


def _times(run: Run, samples: int, times: int = 1) -> list[float]:
    """Seconds of so many runs together, the first two left out."""
    return [race.seconds(run, time.perf_counter, times) for _ in range(samples + 2)][2:]


if __name__ == "__main__":
    print(json.dumps(times(json.loads(sys.argv[1]))))
