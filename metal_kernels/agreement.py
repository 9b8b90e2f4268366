"""Decides whether a kernel's result agrees with the plain form's, by limits for each operation and dtype.

The relative RMS of a whole output shows a kernel that is a little wrong everywhere; the distance of each element, in units of
its own size and of its row's RMS, shows one wrong element or row among millions. All limits are multiples of the unit of the
coarsest type that an output has gone through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

# The problem is "" if they agree, and None where there is nothing to compare.
Judged = tuple["float | None", "str | None"]
Judge = Callable[[str, tuple[Any, ...], Any, Any], Judged]


class Limit(NamedTuple):
    """In units of the last place: relative RMS, and each element's distance by its own size and by its row's RMS."""

    rms: float
    own: float
    row: float


# How far rounding to a type takes a number near 1. Sums of float32 in another order differ by hundreds of its own.
UNITS = {mx.bfloat16: 2.0**-9, mx.float16: 2.0**-12, mx.float32: 2.0**-16}
# Where MLX multiplies float32 matrices as TF32, which cuts both operands after 10 bits, plain forms are no better than this.
TF32_UNIT = 2.0**-9

# Rounded once at the end, from float32 on both sides: where the sums differ in their last bits an element is rounded to the
# neighbour, two units away.
ONCE = Limit(2, 4, 4)
# Rounded on the way too, and multiplied then: a row of a product takes up what its inputs were rounded to.
BETWEEN = Limit(4, 6, 16)
LIMITS = {
    "lightning_attn": ONCE,
    "qkv_lightning_attn": ONCE,
    "qk_norm_rope": ONCE,
    "few_queries": ONCE,
    "many_keys": ONCE,
    "linear_gate": ONCE,
    "add_norm": BETWEEN,  # the norm rounds before its weight and after it
    "norm_router": BETWEEN,
    "norm_qmv": BETWEEN,
    "gate_qmv": BETWEEN,
    "add_qmv": ONCE,
    "head": BETWEEN,
    "embed": ONCE,
    "decode_moe": ONCE,
    "prefill_moe": BETWEEN,  # 16-bit operands
}
# Outputs that stay float32 from the first to the last operation, whatever the inputs are: the states, by which all later
# tokens are read.
EXACT = {("lightning_attn", 1), ("qkv_lightning_attn", 1)}
# Where an operation takes what is added to its product, which tells nothing of the product and may be far larger, or cancel
# it out. So the product is held to the limits, and the sum to its rounding.
ADDED = {"add_qmv": 2, "gate_qmv": 6, "decode_moe": 4, "prefill_moe": 4}
# A row that cancels out is small by chance, and its rounding is not: so much of the whole output's RMS counts for each row,
# and so much of it is the rounding of sums of float32, whatever the type.
WHOLE, SUMS = 1e-3, 1e-5
# How far the rounding of such a sum takes two that differ in their last bits.
ROUNDING = {mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10, mx.float32: 2.0**-22}
# The smallest numbers of a type have fewer bits: so far apart are neighbours of which either may be right, four of them.
SMALLEST = {mx.float16: 2.0**-22}
TINY = 1e-30
# Beyond this a distance says no more, and its square is no number to keep.
FARTHEST = 1e15


def agree(operation: str, arguments: tuple[Any, ...], found: Any, expected: Any) -> Judged:
    """The largest relative RMS of the outputs, and what is wrong with them."""
    found, expected = listed(found), listed(expected)
    through = [x.dtype for x in (*arguments, *expected) if isinstance(x, mx.array)]
    units = UNITS if _multiplies_float32() else {dtype: max(unit, TF32_UNIT) for dtype, unit in UNITS.items()}
    coarsest = max(units[dtype] for dtype in through if dtype in units)
    errors = [0.0]
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None, f"output {i} is {a.shape} {a.dtype} instead of {b.shape} {b.dtype}"
        unit = units[mx.float32] if (operation, i) in EXACT else coarsest
        error, problem = _compare(a, b, _added(operation, arguments, b), unit, LIMITS[operation])
        if problem is None or problem:
            return error, problem and f"output {i} of {operation} {problem}"
        errors.append(error or 0.0)
    return max(errors), ""


def same_bits(operation: str, arguments: tuple[Any, ...], found: Any, expected: Any) -> Judged:
    """How large a part of the outputs differs, and in what; for operations that leave no rounding to the device."""
    floats = [x for x in listed([*arguments, *expected]) if mx.issubdtype(x.dtype, mx.floating)]
    if not all(mx.isfinite(x).all() for x in floats):
        return None, None
    for i, (a, b) in enumerate(zip(listed(found), listed(expected), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None, f"output {i} is {a.shape} {a.dtype} instead of {b.shape} {b.dtype}"
        part = float((a != b).mean())
        if part > 0:
            return part, f"output {i} of {operation} differs in {part:.2g} of its numbers"
    return 0.0, ""


def _added(operation: str, arguments: tuple[Any, ...], expected: mx.array) -> mx.array | None:
    """What was added to the product, if anything."""
    place = ADDED.get(operation, len(arguments))
    found = arguments[place] if place < len(arguments) else None
    return None if found is None else found.reshape(expected.shape)


def _compare(found: mx.array, expected: mx.array, added: mx.array | None, unit: float, limit: Limit) -> Judged:
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    product = b if added is None else b - added.astype(mx.float32)
    if not mx.isfinite(product).all():
        return None, None
    if not mx.isfinite(a).all():
        return None, "is not finite"
    largest = mx.maximum(mx.maximum(mx.abs(product).max(), mx.abs(b).max()), TINY)  # so that squares are numbers
    a, b, product = a / largest, b / largest, product / largest
    rounding = mx.abs(b) * (0 if added is None else ROUNDING[expected.dtype])
    rounding = rounding + SMALLEST.get(expected.dtype, 0.0) / largest
    squares = mx.square(product).mean()
    rows = mx.sqrt(mx.square(product).mean(axis=-1, keepdims=True) + WHOLE**2 * squares)
    distance = mx.minimum(mx.abs(a - b), FARTHEST)
    rms = float(mx.sqrt(mx.square(mx.maximum(distance - rounding, 0)).mean() / mx.maximum(squares, TINY)))
    rounding = rounding + unit * (limit.own * mx.abs(product) + limit.row * rows) + SUMS * mx.sqrt(squares)
    worst = float((distance / mx.maximum(rounding, TINY)).max())
    if rms > unit * limit.rms:
        return rms, f"differs by {rms:.2g} relative RMS"
    if worst > 1:
        return rms, f"has an element {worst:.2g} times further away than rounding takes it"
    return rms, ""


@cache
def _multiplies_float32() -> bool:
    """Whether a product of float32 matrices keeps bits that TF32 has not."""
    x = mx.full((256, 256), 1 + 2.0**-13)
    return bool(mx.array_equal(x @ mx.eye(256), x))


def listed(result: Any) -> list[mx.array]:
    """The arrays of a result or of arguments, at any depth."""
    if isinstance(result, mx.array):
        return [result]
    return [x for part in result for x in listed(part)] if isinstance(result, tuple | list) else []
