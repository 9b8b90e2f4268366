"""Matrices, or stacks of one per expert, as MLX stores them, plain or quantized, and what kernels ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import mlx.core as mx

from metal_kernels.constants import FLOATS

# Codes of the kernels' MODE, and the bits of each that they read.
MODES = {"plain": 0, "affine": 1, "mxfp4": 2, "mxfp8": 2}
BITS = {"plain": (16, 32), "affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,)}
# Rows, groups and 16-byte loads all fall on blocks of 32 values.
BLOCK = 32
# MLX hands shorter arrays to kernels in another address space.
MIN_SIZE = 8
# What a threadgroup may have on every Apple GPU (Metal's feature set tables).
THREADGROUP_BYTES = 32 * 1024

# Where an array may start in a `bundle`: whole lines of memory.
WORDS = 64

_kinds: dict[object, int] = {}


class Weights:
    """Dataclasses of the matrices that an operation reads together; build one once a layer."""

    @cached_property
    def leaves(self) -> list[mx.array]:
        """The arrays, in order."""
        return [x for x in self._flat() if hasattr(x, "dtype")]

    @cached_property
    def kind(self) -> int:
        """Equal for weights of equal shapes and formats."""
        flat = ((x.shape, x.dtype) if isinstance(x, mx.array) else x for x in self._flat())
        return _kinds.setdefault((type(self), *flat), len(_kinds))

    def map(self, change: Callable[[mx.array], Any]) -> Self:
        """The same of changed arrays, in the order of `leaves`."""

        def changed(part: Any) -> Any:
            if isinstance(part, tuple):
                return tuple(map(changed, part))
            return (
                part.map(change) if isinstance(part, Weights) else change(part) if isinstance(part, mx.array) else part
            )

        return type(self)(*map(changed, self._parts))

    @property
    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]

    def _flat(self) -> Iterator[Any]:
        parts = [*self._parts]
        while parts:
            part = parts.pop(0)
            if isinstance(part, Weights | tuple):
                parts[:0] = part._parts if isinstance(part, Weights) else part
            else:
                yield part


@dataclass(frozen=True, eq=False)
class Packed(Weights):
    """Weights [..., N, K], of which MLX packs K.

    ``mode`` is that of ``mx.quantize`` ("affine", "mxfp4", "mxfp8", "nvfp4"), or "plain" for an array of floats with
    ``bits`` 16 or 32 and no scales. Quantized: ``weight`` is [..., N, K * bits / 32] uint32, a little-endian stream of
    ``bits`` a value; ``scales`` [..., N, K / group_size], and for "affine" ``biases`` of the same shape and dtype:
    value = scale * q + bias.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 16
    group_size: int = 0
    mode: str = "plain"

    def dequantize(self) -> mx.array:
        """The weights as floats [..., N, K], float32 for plain and affine, exactly what the kernels multiply by."""
        if self.scales is None:
            return self.weight.astype(mx.float32)
        return mx.dequantize(self.weight, **self.layout, dtype=mx.float32)

    @property
    def layout(self) -> dict[str, Any]:
        """How MLX's float32 products read quantized weights."""
        scales, biases = self.scales, self.biases
        if scales is not None and biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return {"scales": scales, "biases": biases, "group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def stored_bits(self) -> int:
        """Bits of a value in memory; a plain array knows its own."""
        return 8 * self.weight.dtype.size if self.mode == "plain" else self.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K], unpacked."""
        *leading, width = self.weight.shape
        return (*leading, width if self.mode == "plain" else width * 32 // self.bits)

    @property
    def format(self) -> tuple[str, int, int, mx.Dtype, mx.Dtype | None]:
        """Equal for two matrices exactly if one compiled kernel reads both."""
        scales = None if self.scales is None else self.scales.dtype
        return self.mode, self.stored_bits, self.group_size, self.weight.dtype, scales

    @property
    def is_readable(self) -> bool:
        """Whether the kernels know the format: MLX's affine, mxfp4 and mxfp8, or plain floats in blocks of 32."""
        if self.mode not in MODES or self.stored_bits not in BITS[self.mode] or self.shape[-1] % BLOCK:
            return False
        if self.mode == "plain":
            return self.weight.dtype in FLOATS and self.weight.size >= MIN_SIZE
        return (
            self.group_size % BLOCK == 0
            and self.scales is not None
            and self.scales.size >= MIN_SIZE
            and (self.scales.dtype in FLOATS if self.mode == "affine" else self.scales.dtype == mx.uint8)
            and (self.biases is not None) == (self.mode == "affine")
        )

    @property
    def arrays(self) -> list[mx.array]:
        """Weight, scales and biases; what a format lacks is filled with what it has, and never read."""
        scales = self.weight if self.scales is None else self.scales
        return [self.weight, scales, scales if self.biases is None else self.biases]

    @property
    def template(self) -> list[tuple[str, int]]:
        """The kernels' arguments MODE, BITS, GROUP, N, K."""
        (*_, N, K), group = self.shape, self.group_size if self.mode != "plain" else BLOCK
        return [("MODE", MODES[self.mode]), ("BITS", self.stored_bits), ("GROUP", group), ("N", N), ("K", K)]

    def factor_bytes(self, rows: int) -> tuple[int, int]:
        """What scales and biases of so many rows take in threadgroup memory; an array that is not used has four bytes."""
        per_row = self.shape[-1] // max(self.group_size, BLOCK)
        scales = 4 if self.scales is None else rows * per_row * self.scales.dtype.size
        return scales, 4 if self.biases is None else scales


@dataclass(frozen=True, eq=False)
class Matrices(Weights):
    """One matrix [N, K], or two [N, K] and [M, K] that share an input."""

    first: Packed
    second: Packed | None = None

    @property
    def all(self) -> list[Packed]:
        """The matrices that there are."""
        return [w for w in (self.first, self.second) if w is not None]

    @property
    def supported(self) -> bool:
        """Whether the kernels read them: one format that they know, and one K."""
        format_, width = self.first.format, self.first.weight.shape[1:]
        return all(
            w.weight.ndim == 2
            and w.weight.size >= MIN_SIZE
            and w.is_readable
            and (w.format, w.weight.shape[1:]) == (format_, width)
            for w in self.all
        )

    @property
    def arrays(self) -> list[mx.array]:
        """Of the first and the second; the first's again where there is no second."""
        return [*self.first.arrays, *(self.second or self.first).arrays]


def starts(arrays: Sequence[mx.array]) -> list[int]:
    """Where each array starts in their `bundle`, in words."""
    sizes = [-(-a.size * a.dtype.size // (4 * WORDS)) * WORDS for a in arrays]
    return [0, *accumulate(sizes)][: len(sizes)]


def bundle(arrays: Sequence[mx.array]) -> tuple[mx.array, list[mx.array]] | None:
    """Copies of arrays in one buffer [words] uint32, and the same arrays as parts of it; None where one has no whole words.

    A kernel that binds the buffer binds one array in place of many.
    """
    if any(a.nbytes % 4 for a in arrays):
        return None
    parts, at = [], 0
    for a, start in zip(arrays, starts(arrays), strict=True):
        words = a.reshape(-1).view(mx.uint32)
        parts += [mx.zeros((start - at,), mx.uint32), words]
        at = start + words.size
    buffer = mx.concatenate(parts)
    mx.eval(buffer)
    each = zip(arrays, starts(arrays), strict=True)
    within = [buffer[start : start + a.nbytes // 4].view(a.dtype).reshape(a.shape) for a, start in each]
    mx.eval(within)
    return buffer, within


def padded(*sizes: int) -> int:
    """Bytes of threadgroup memory that arrays of these sizes take, in whatever order they lie."""
    return sum(-(-n // 16) * 16 for n in sizes)
