"""Groups launches of a kernel into variants: a proof of one launch holds for all launches of its variant."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

# The tokens of most tiles and chunks, or a few of them; of so few at once each number has its own template.
TILE, FEW = 32, 8


class Variant(NamedTuple):
    """What a verdict is about.

    Attributes:
        key: Equal for equal variants of equal sources.
        kernel: The kernel's name.
        words: The rest, to be read.
    """

    key: str
    kernel: str
    words: str


def variant_of(
    kernel: str,
    digest: str,
    template: Sequence[tuple[str, Any]],
    inputs: Sequence[mx.array],
    same: Sequence[int],
    outputs: Sequence[mx.Dtype],
    shapes: Sequence[tuple[int, ...]],
    grid: Sequence[int],
    threadgroup: Sequence[int],
) -> Variant:
    """The variant that a launch is of.

    Arrays of fewer than 8 elements and scalars get other code from MLX. A grid may say nothing of how many tokens a
    threadgroup goes through, which the sizes of what it writes do, nor whether the last tile or chunk of them is a whole one.
    """
    kinds = [(_short(x.dtype), min(x.ndim, 1), x.size < 8) for x in inputs]
    sizes = "x".join(str(_power(n)) for n in grid)
    written = " ".join(_size(shape) for shape in shapes)
    values = " ".join(f"{name}={_short(value)}" for name, value in template)
    made = " ".join(map(_short, outputs))
    whole = repr((kernel, digest, values, kinds, tuple(same), made, written, sizes, tuple(threadgroup)))
    words = f"{values}, {kinds[0][0]} to {made}, grid {sizes}, writes {written}"
    return Variant(hashlib.sha256(whole.encode()).hexdigest()[:24], kernel, words)


def _size(shape: tuple[int, ...]) -> str:
    """How much, and which axes but the last one, whose length the template knows, end in a part of a tile."""
    parts = "".join(str(axis) for axis, n in enumerate(shape[:-1]) if n > FEW and n % TILE)
    return f"{_power(math.prod(shape))}{parts and f' (part of a tile on axis {parts})'}"


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(0, n - 1).bit_length()


def _short(value: Any) -> str:
    return str(value).removeprefix("mlx.core.") if isinstance(value, mx.Dtype) else str(int(value))
