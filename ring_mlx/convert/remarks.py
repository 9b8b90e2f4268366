"""What a conversion gives up, for the person who asked for it: before it is written, and measured when it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ring_mlx.checkpoint.weights import dtype_name
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import Output, Plan, make_plan
from ring_mlx.convert.recipes import AFFINE_GROUPS
from ring_mlx.convert.sources import Source
from ring_mlx.convert.writer import GRID_STEPS
from ring_mlx.model.config_values import some

# Of a float: bits of the fraction, the hidden one included, and the largest exponent.
PRECISION = {mx.float32: (24, 127), mx.float16: (11, 15), mx.bfloat16: (8, 127)}
NAMES = 3


def remarks(source: Source, plan: Plan, options: Options) -> list[str]:
    """A line on each thing that is not as the source has it, or as was asked for."""
    return [line for line in (left_float(plan), _cast(plan), _rounded_grids(source, plan, options)) if line]


def said_before(source: Source, plan: Plan, options: Options) -> list[str]:
    """Of `remarks` what matters enough to be said before the work."""
    return [line for line in (mostly_float(plan), _cast(plan), _rounded_grids(source, plan, options)) if line]


def left_float(plan: Plan) -> str:
    """Which matrices were to be quantized and cannot be."""
    if not plan.left_float:
        return ""
    left = set(plan.left_float)
    cols = [o.shape[-1] for o in plan.outputs if o.path in left and o.name.endswith(".weight")]
    fitting = {g: sum(n % g == 0 for n in cols) for g in AFFINE_GROUPS}
    group = max(fitting, key=lambda g: (fitting[g], g))
    remedy = f"; {group} would divide {fitting[group]} of them (--q-group-size {group})" if fitting[group] else ""
    names = some(plan.left_float, NAMES)
    return f"left in float, as their rows do not divide into groups: {len(plan.left_float)} ({names}){remedy}"


def mostly_float(plan: Plan) -> str:
    """A warning if more than half of the weights that were to be quantized cannot be."""
    left = set(plan.left_float)
    wanted = [o for o in plan.outputs if o.name.endswith(".weight") and (o.setting is not None or o.path in left)]
    total, whole = sum(o.count for o in wanted if o.path in left), sum(o.count for o in wanted)
    if 2 * total <= whole:
        return ""
    return f"{total / whole:.0%} of the weights that were to be quantized stay in float; {left_float(plan)}."


def _cast(plan: Plan) -> str:
    lossy: dict[tuple[str, str], list[str]] = {}
    for o in plan.outputs:
        before = o.matrix.dtype if o.setting is None else o.matrix.scale_dtype if o.copied else None
        if before is not None and any(a < b for a, b in zip(PRECISION[o.dtype], PRECISION[before], strict=True)):
            lossy.setdefault((dtype_name(before), dtype_name(o.dtype)), []).append(o.name)
    casts = [f"{len(names)} from {a} to {b} ({some(names, NAMES)})" for (a, b), names in lossy.items()]
    return f"cast to a narrower float: {'; '.join(casts)}; --dtype chooses another" if casts else ""


def _is_grid(output: Output) -> bool:
    return output.copied and output.matrix.is_integer


def _rounded_grids(source: Source, plan: Plan, options: Options) -> str:
    grids = [o for o in plan.outputs if _is_grid(o)]
    if not grids or plan.dtype == mx.float32:
        return ""
    exact = make_plan(source, replace(options, dtype="float32")).nbytes
    closer = "--dtype float16 comes closer at the same size, " if plan.dtype == mx.bfloat16 else ""
    return (
        f"the integers of {len(grids)} matrices are kept, their scales rounded to {dtype_name(plan.dtype)}; {closer}"
        f"--dtype float32 keeps them too ({exact / 1e9:.3f} GB instead of {plan.nbytes / 1e9:.3f} GB)"
    )


def grid_steps(output: Output, exact: Mapping[str, mx.array], stored: Mapping[str, mx.array]) -> float:
    """How far the rounding of scales and biases moves a weight, at most, in steps of the source's grid; 0 for others."""
    if not _is_grid(output) or output.setting is None:
        return 0.0
    scale, bias = exact["scales"], exact["biases"]
    off_scale, off_bias = stored["scales"].astype(mx.float32) - scale, stored["biases"].astype(mx.float32) - bias
    top = (1 << output.setting.bits) - 1
    # Linear in the code, so the first or the last is the worst.
    worst = mx.maximum(mx.abs(off_bias), mx.abs(off_bias + off_scale * top))
    return float((worst / mx.maximum(mx.abs(scale), float(np.finfo(np.float32).tiny))).max())


def grid_note(manifest: Mapping[str, Any]) -> str:
    """What a folder's manifest says of it, from `grid_steps` of its shards; empty if nothing was rounded."""
    steps = [s for s in manifest.get(GRID_STEPS, {}).values() if isinstance(s, float)]
    return f"weights within {max(steps):.2g} of a step of the source's integers" if steps else ""
