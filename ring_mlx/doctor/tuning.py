"""What this machine chose of kernels and sizes, as it is kept; times nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metal_kernels import choices, machine
from ring_mlx.doctor.finding import NOTE, OK, Finding
from ring_mlx.model.decode_step import COMPILED_ON
from ring_mlx.tuning import buffers
from ring_mlx.tuning.job import is_current

SECTION = "tuning"


def check() -> list[Finding]:
    """A line for each kind of model that was timed here."""
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
