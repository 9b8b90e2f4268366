"""Parts of tensors from disk, a few MiB at a time.

Rows are read alone. Columns are not: neighbours lie in the same pages of the disk, so whole rows are read and the rest
is dropped at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import cast, check_dtype, in_order
from ring_mlx.distributed.cuts import Cut, Entry

STEP_BYTES = 16 << 20


def read_parts(
    entries: Mapping[str, Entry], cuts: Mapping[str, Cut], num_experts: int, dtype: mx.Dtype, exact: bool = False
) -> dict[str, mx.array]:
    """Arrays under parameter names, computed: cut, experts stacked, floats cast as `ring_mlx.checkpoint.weights.cast` does.

    Raises:
        WeightsError: If a tensor is of an unknown dtype or cannot be read, or an expert is missing.
    """
    files, out = TensorFiles(), {}
    try:
        for name, entry in entries.items():
            cut = cuts.get(name)
            if isinstance(entry, dict):
                array = mx.stack([_part(files, tensor, cut) for tensor in in_order(name, entry, num_experts)])
            else:
                array = _part(files, entry, cut)
            out[name] = cast(name, array, dtype, exact)
            del array
            mx.eval(out[name])
            mx.clear_cache()
    finally:
        files.close()
    return out


def _part(files: TensorFiles, tensor: Tensor, cut: Cut | None) -> mx.array:
    check_dtype(tensor)
    *outer, cols = tensor.shape
    if cut is None or cut.axis == -1:
        part = _chunks(files, tensor, 0, tensor.matrix[0], cut)
        return part.reshape(*outer, part.shape[-1])
    rows = outer[-1]
    starts = range(0, tensor.matrix[0], rows)
    parts = [_chunks(files, tensor, s + lo, s + hi, None) for s in starts for lo, hi in cut.ranges]
    return mx.concatenate(parts).reshape(*outer[:-1], -1, cols)


def _chunks(files: TensorFiles, tensor: Tensor, start: int, stop: int, cut: Cut | None) -> mx.array:
    """Rows of the matrix, their columns cut, read in steps."""
    step = max(1, STEP_BYTES // (tensor.matrix[1] * tensor.element_bytes))
    parts = []
    for at in range(start, stop, step):
        part = files.read(tensor, at, min(at + step, stop))
        if cut is not None:
            part = cut_array(part, cut)
            mx.eval(part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def cut_array(x: mx.array, cut: Cut) -> mx.array:
    """The part of an array that is in memory, not yet computed."""
    if cut.axis == -2:
        return mx.concatenate([x[..., lo:hi, :] for lo, hi in cut.ranges], axis=-2)
    if cut.repeat > 1:
        x = mx.repeat(x, cut.repeat, axis=-1)
    x = mx.concatenate([x[..., lo:hi] for lo, hi in cut.ranges], axis=-1)
    return mx.zeros_like(x) if cut.is_zero else mx.contiguous(x)
