"""Bits by module for a size: measured sensitivities, the choice, and the recipe that says both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ring_mlx.convert.allocation import Choice, allocate
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import Plan, make_plan
from ring_mlx.convert.recipes import read_recipe
from ring_mlx.convert.sensitivity import MEASURED_BITS, groups, measure
from ring_mlx.convert.sources import Source
from ring_mlx.errors import OptionError
from ring_mlx.system.progress import Progress

RECIPE = "recipe.json"
# Of a tensor's entry in a shard's header and in the index.
ENTRY_BYTES = 160


def find_recipe(
    source: Source,
    options: Options,
    known: Path | None,
    text: Sequence[Mapping[str, Any]],
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """The recipe that options ask for: of a file, of ``known`` if it exists, or measured on ``text``; None if they ask for none.

    Raises an OptionError if the size cannot be reached, or the weights are not here.
    """
    if options.has_recipe_file and options.recipe:
        return read_recipe(Path(options.recipe))
    if not options.has_target:
        return None
    if known is not None and known.is_file():
        return read_recipe(known)
    if source.repo is not None:
        raise OptionError(
            "--target-size and --target-bits measure the weights, which are still on the hub; leave --stream and --dry-run "
            "out, or give the recipe.json of another conversion as --quant-predicate."
        )
    plan = make_plan(source, replace(options, target_bytes=None, target_bits=None))
    most = _most_bytes(plan, options)
    choices = _choices(plan, {})
    least = plan.nbytes + sum(some[0].nbytes for some in choices.values()) - _grouped_bytes(plan)
    if least > most:
        raise OptionError(
            f"{most / 1e9:.3f} GB cannot be reached: with 2 bits it is {least / 1e9:.3f} GB; ask for more, or add "
            "--q-group-size 128."
        )
    losses = measure(source, plan, text, progress)
    choices = _choices(plan, losses)
    chosen = allocate(list(choices.values()), most - plan.nbytes + _grouped_bytes(plan))
    assert chosen is not None
    bits = {o.path: c.bits for some, c in zip(groups(plan).values(), chosen, strict=True) for o in some}
    left = {o.path: o.setting.bits for o in plan.outputs if o.setting is not None and o.path not in bits}
    return {
        "format": 1,
        "most_bytes": most,
        "expected_kl": sum(c.loss for c in chosen),
        f"kl_of_{MEASURED_BITS}_bits": {group: loss[MEASURED_BITS] for group, loss in losses.items()},
        "bits": dict(sorted((bits | left).items())),
    }


def _most_bytes(plan: Plan, options: Options) -> int:
    if options.target_bits is not None:
        return int(options.target_bits * sum(o.count for o in plan.outputs) / 8)
    assert options.target_bytes is not None
    return options.target_bytes - ENTRY_BYTES * sum(len(o.stored) for o in plan.outputs)


def _grouped_bytes(plan: Plan) -> int:
    return sum(o.nbytes for some in groups(plan).values() for o in some)


def _choices(plan: Plan, losses: Mapping[str, Mapping[int, float]]) -> dict[str, list[Choice]]:
    """The forms that each group can have."""
    found = {}
    for group, some in groups(plan).items():
        found[group] = [
            Choice(bits, sum(replace(o, setting=replace(o.setting, bits=bits)).nbytes for o in some if o.setting), loss)
            for bits, loss in losses.get(group, {2: 0.0}).items()
        ]
    return found
