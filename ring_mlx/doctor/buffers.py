"""A model's steps and prompts timed in a process of its own, whose command buffers are as long as its environment says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from metal_kernels import choices
from metal_kernels.choices import Value
from ring_mlx.bench.random_weights import random_model
from ring_mlx.checkpoint.loading import load_model
from ring_mlx.model.model import Model
from ring_mlx.tuning import job, works
from ring_mlx.tuning.buffers import MB, OPS, Child, Timed, settings_of
from ring_mlx.tuning.race import Run

STEPS, STEPS_A_SAMPLE, PROMPTS, TIMEOUT_S = 20, 8, 2, 60.0


def in_a_process(what: Mapping[str, Any]) -> Child:
    """A `Child` that makes the model which ``what`` names, as `model_of`, with the packages of this process."""

    def child(value: Value) -> Timed:
        environment = {k: v for k, v in os.environ.items() if k not in (OPS, MB)} | settings_of(value)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", "-m", "ring_mlx.doctor.buffers", json.dumps(what)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        found: Timed = json.loads(done.stdout.splitlines()[-1])
        return found

    return child


def model_of(what: Mapping[str, Any]) -> Model:
    """The model that ``what`` names; nothing is timed for it.

    Args:
        what: {"folder": PATH}, or {"random": SHAPE} with "bits" (4, 0 for none) and "layers" if wanted.
    """
    with job.later():
        if "folder" in what:
            return load_model(what["folder"])
        bits = what.get("bits", 0 if what["random"] == "golden" else 4)
        model = random_model(what["random"], bits or None, layers=what.get("layers"))
        job.settle(model)
        return model


def times(what: Mapping[str, Any]) -> Timed:
    """Seconds of steps and prompts of a model, with the environment as it is."""
    model, now = model_of(what), choices.active()
    return {
        "step": _times(works.step(model, now, is_whole=True), STEPS, STEPS_A_SAMPLE),
        "prompt": _times(works.prompt(model, now), PROMPTS),
    }


def _times(run: Run, samples: int, times: int = 1) -> list[float]:
    """Seconds of so many runs together, the first two left out."""
    out = []
    for _ in range(samples + 2):
        began = time.perf_counter()
        run(times)
        out.append((time.perf_counter() - began) / times)
    return out[2:]


if __name__ == "__main__":
    print(json.dumps(times(json.loads(sys.argv[1]))))
