"""Memory that files are read into and MLX computes with, without a copy.

A slot is one row of an array [slots, ...] for each part of an expert. Files are read into the arrays' memory, which CPU
and GPU share; the caller makes sure that nothing is computing with the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ring_mlx.checkpoint.safetensors_header import TensorSpec
from ring_mlx.checkpoint.weights import DTYPES, dtype_name
from ring_mlx.errors import OptionError, WeightsError


class Slots:
    """Memory for ``count`` experts of the same parts; a file's floats that are narrower than ``dtype`` are widened.

    Raises a WeightsError if floats would be narrowed, an OptionError if arrays here cannot be written from outside.
    """

    def __init__(self, parts: Sequence[TensorSpec], count: int, dtype: mx.Dtype) -> None:
        self.count = count
        self.arrays: dict[str, mx.array] = {}
        # Of each part, its rows and whether they are wider than in the file.
        self._parts: list[tuple[TensorSpec, Any, bool]] = []
        for part in parts:
            stored = stored_dtype(part, dtype)
            width = part.nbytes * stored.size // DTYPES[part.dtype].size
            raw: Any = mx.zeros((count, width), mx.uint8)
            whole = raw.view(stored).reshape(count, *part.shape)
            mx.eval(raw, whole)
            rows = np.frombuffer(memoryview(raw), np.uint8).reshape(count, width)
            self._check_shared(rows, whole)
            self.arrays[part.name] = whole
            self._parts.append((part, rows, stored != DTYPES[part.dtype]))

    def buffers(self, slot: int) -> list[Any]:
        """Memory for each part's bytes in the file: a row, or scratch where floats are widened."""
        return [np.empty(p.nbytes, np.uint8) if is_wider else rows[slot] for p, rows, is_wider in self._parts]

    def settle(self, slot: int, buffers: Sequence[Any]) -> None:
        """Widen what was read into scratch."""
        for (part, rows, is_wider), read in zip(self._parts, buffers, strict=True):
            if is_wider:
                rows[slot].view(np.float32)[:] = _widened(read, part.dtype)

    @staticmethod
    def _check_shared(rows: Any, whole: mx.array) -> None:
        """Refuse a device on which MLX does not see what is written into the rows."""
        rows[-1, :] = 0x3C
        seen = bool((whole[-1].view(mx.uint8) == 0x3C).all().item())
        rows[-1, :] = 0
        # On an H200 this holds here, and yet answers were wrong once kernels had read the arrays.
        if not seen or is_on_cuda():
            raise OptionError(
                f"--expert-cache-bytes cannot work on {mx.default_device()}, whose arrays are not in memory that files "
                "can be read into; leave it out."
            )


def is_on_cuda() -> bool:
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


def stored_dtype(part: TensorSpec, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a part's array; a WeightsError if it would be narrower than the file's."""
    own = DTYPES[part.dtype]
    if not mx.issubdtype(own, mx.floating) or own == dtype:
        return own
    if dtype != mx.float32:
        wanted = dtype_name(dtype)
        raise WeightsError(
            f"experts on disk are {part.dtype} and cannot be read as {wanted}; convert with --dtype {wanted}."
        )
    return mx.float32


def slot_bytes(parts: Sequence[TensorSpec], dtype: mx.Dtype) -> int:
    """Bytes of one expert in memory."""
    return sum(p.nbytes * stored_dtype(p, dtype).size // DTYPES[p.dtype].size for p in parts)


def _widened(read: Any, dtype: str) -> Any:
    if dtype == "F16":
        return read.view(np.float16).astype(np.float32)
    return (read.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
