"""The work of ``doctor --tune``: times the choices with one model and keeps the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metal_kernels import choices
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.doctor.buffers import in_a_process, model_of
from ring_mlx.errors import OptionError
from ring_mlx.model.decode_step import COMPILED_ON
from ring_mlx.system.pace import Progress
from ring_mlx.tuning import buffers, job, table
from ring_mlx.tuning.job import Tuning
from ring_mlx.tuning.race import Budget, Verdict


@dataclass
class Made:
    """What was chosen, and the verdict on command buffers where there are any."""

    tuning: Tuning
    buffers: Verdict | None

    def text(self) -> str:
        """For a terminal."""
        return table.text(self.tuning, self._more())

    def markdown(self) -> str:
        """To paste."""
        return table.markdown(self.tuning, self._more())

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return self.tuning.as_dict() | {"buffers": self.buffers and job.as_dict(self.buffers)}

    def _more(self) -> list[Verdict]:
        return [] if self.buffers is None else [self.buffers]


def tune(
    folder: Path | None, shape: str | None, seconds: float | None = None, progress: Progress | None = None
) -> Made:
    """Time every choice with a model, and keep what was found for models of the same shapes.

    Args:
        folder: A checkpoint; None is the packaged toy, but for ``shape``.
        shape: Random weights at these shapes instead.
        seconds: For all choices, `job.SECONDS` by default.
        progress: Told how far it is.

    Raises:
        OptionError: If the environment keeps the tables.
        RingError: As `ring_mlx.load_model`.
    """
    if choices.is_off():
        raise OptionError(f"{choices.SWITCH}=off keeps the tables; unset {choices.SWITCH}.")
    what = {"random": shape} if shape else {"folder": str(folder or demo_model_path())}
    model = model_of(what)
    tuning = job.tune(model, Budget(job.SECONDS if seconds is None else seconds), progress)
    job.keep(model, tuning)
    del model  # or there would be two in memory
    verdict = None
    if tuning.backend in COMPILED_ON and not buffers.is_set():
        verdict = buffers.choose(in_a_process(what), Budget(buffers.SECONDS), progress)
        buffers.keep(verdict, tuning.backend)
    return Made(tuning, verdict)
