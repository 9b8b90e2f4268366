"""Some rows of a parameter as they are stored."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import dtype_name
from ring_mlx.convert.fit import quantize
from ring_mlx.convert.plan import Output
from ring_mlx.convert.remarks import grid_steps
from ring_mlx.errors import WeightsError

# Weights that are in float32 at one time; the fit of scales holds about twelve times that.
CHUNK_WEIGHTS = 2 << 20
BITS_OF_INFINITY = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}


def encode(output: Output, files: TensorFiles, start: int, stop: int, fit: str) -> tuple[dict[str, mx.array], float]:
    """Some rows of a parameter as stored, by suffix, and their `grid_steps`.

    Raises a WeightsError if they are not finite, or too large.
    """
    steps = 0.0
    if output.copied:
        packed = output.matrix.read_packed(files, start, stop)
        out = {k: v.astype(output.dtype) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in packed.items()}
        read, steps = list(packed.values()), grid_steps(output, packed, out)
    else:
        rows = output.matrix.read(files, start, stop)
        read = [rows]
        if output.setting is None:
            out = {"weight": rows.astype(output.dtype)}
        else:
            out = quantize(rows, output.setting, output.dtype, fit)
    check_finite(output, read, out.values())
    mx.eval(out)
    return out, steps


def check_finite(output: Output, read: Iterable[mx.array], stored: Iterable[mx.array] = ()) -> None:
    """Raises a WeightsError if what was read for a parameter is not finite, or what is stored is not."""
    if not all(map(_is_finite, read)):
        raise WeightsError(f"{output.name} holds values that are not finite; download the checkpoint again.")
    if not all(map(_is_finite, stored)):
        raise WeightsError(
            f"{output.name} holds values that are too large for {dtype_name(output.dtype)}; use --dtype bfloat16."
        )


def _is_finite(array: mx.array) -> bool:
    """By the bits: on a CPU mx.isfinite takes ten times as long."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return True
    integers, infinity = BITS_OF_INFINITY[array.dtype]
    return bool((array.view(integers) & (infinity | infinity - 1)).max() < infinity)
