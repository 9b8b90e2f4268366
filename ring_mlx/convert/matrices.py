"""The matrices of a checkpoint, whose rows can be read in float: floats, MLX's own packing, FP8, stacks of experts.

Integers on a grid (GPTQ, compressed-tensors) are in `ring_mlx.convert.integers`; `ring_mlx.convert.formats` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import BITS, Tensor
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import FLOATS
from ring_mlx.convert.recipes import AFFINE_GROUPS, READ_BITS, Setting
from ring_mlx.errors import WeightsError
from ring_mlx.model import quantization

Parts = Mapping[str, Tensor]
EXPONENTS = ("F8_E8M0", "U8")
# The largest E4M3 times the largest E2M1: a global scale of nvfp4 is the magnitude that these two together stand for.
NVFP4_TOP = 448.0 * 6.0


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: the path of its module, its columns, and the config.json of the source."""

    path: str
    cols: int
    raw: Mapping[str, Any]


class Matrix:
    """A matrix of the source.

    ``setting`` is the MLX format that holds it without loss, ``dtype`` the float type of the source, if there is one,
    ``scale_dtype`` that of MLX's scales; ``is_integer`` says whether the source holds integers on a grid.
    """

    shape: tuple[int, int]
    setting: Setting | None = None
    is_integer = False
    dtype: mx.Dtype | None = None
    scale_dtype: mx.Dtype | None = None

    def __init__(self, parts: Parts) -> None:
        self.parts = dict(parts)

    @property
    def files(self) -> set[Path]:
        """The shards that hold it."""
        return {t.file for t in self.parts.values()}

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows in float, [stop - start, cols]: float32, or the source's dtype if it is float."""
        raise NotImplementedError

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        """Rows as ``weight``, ``scales`` and ``biases`` under ``setting``."""
        raise NotImplementedError

    def _expect(self, suffix: str, shape: tuple[int, int], dtypes: Collection[str]) -> None:
        t = self.parts[suffix]
        if t.matrix != shape or t.dtype not in dtypes:
            raise WeightsError(
                f"{t.name} is {t.dtype} {t.shape} instead of {' or '.join(dtypes)} {shape}; download the checkpoint "
                "again."
            )


class Plain(Matrix):
    """bfloat16, float16 or float32."""

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        (self._tensor,) = self.parts.values()
        if self._tensor.dtype not in FLOATS:
            raise WeightsError(
                f"{self._tensor.name} has dtype {self._tensor.dtype} and nothing that scales it; use another form of "
                "the checkpoint."
            )
        self.shape, self.dtype = self._tensor.matrix, FLOATS[self._tensor.dtype]

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        return files.read(self._tensor, start, stop)


class MLXPacked(Matrix):
    """weight, scales and biases of an mlx-community conversion."""

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        weight, scales = self.parts["weight"], self.parts["scales"]
        found = quantization.module_settings(
            of.raw, of.path, of.cols, weight.matrix[1], scales.matrix[1], "biases" in parts
        )
        if found is None:
            raise WeightsError(f"{weight.name} has a quantization that cannot be told; convert the original.")
        self._setting = setting = Setting(*found)
        affine = setting.mode == "affine"
        exists = setting.bits in READ_BITS and setting.group_size in AFFINE_GROUPS
        if not (exists if affine else quantization.MODES.get(setting.mode) == (setting.group_size, setting.bits)):
            raise WeightsError(
                f"{weight.name} has {setting.bits} bits in groups of {setting.group_size} ({setting.mode}), which MLX "
                "does not have; convert the original."
            )
        rows, words = weight.matrix
        self.shape, groups = (rows, words * 32 // setting.bits), scales.matrix
        if groups != (rows, self.shape[1] // setting.group_size):
            raise WeightsError(
                f"{scales.name} {groups} does not fit {setting.bits} bits in groups of {setting.group_size}, which "
                "config.json names; download the checkpoint again."
            )
        self._expect("weight", (rows, words), ("U32",))
        self._expect("scales", groups, FLOATS if affine else ("U8",))
        if affine != ("biases" in self.parts):
            raise WeightsError(
                f"{weight.name} {'lacks its' if affine else 'should have no'} biases as {setting.mode}; download the "
                "checkpoint again."
            )
        if affine:
            self._expect("biases", groups, FLOATS)
            self.scale_dtype = FLOATS[max(scales.dtype, self.parts["biases"].dtype, key=lambda d: BITS[d])]
        self._global = self.parts.pop("global_scale", None)
        self.is_integer = self._global is not None
        self.setting = None if self.is_integer else setting

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        p, s = self.read_packed(files, start, stop), self._setting
        scales, biases = p["scales"], p.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        w = mx.dequantize(p["weight"], scales, biases, s.group_size, s.bits, s.mode, dtype=mx.float32)
        return w if self._global is None else w * self._global_scales(files, self._global, start, stop)

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        return {suffix: files.read(t, start, stop) for suffix, t in self.parts.items()}

    def _global_scales(self, files: TensorFiles, tensor: Tensor, start: int, stop: int) -> mx.array:
        """The scale of each row's expert [stop - start, 1], which nvfp4 may have over those of its groups."""
        scales = files.read(tensor).reshape(-1).astype(mx.float32)
        rows_each = self.shape[0] // max(1, scales.size)
        if rows_each * scales.size != self.shape[0]:
            raise WeightsError(
                f"{tensor.name} {tensor.shape} does not divide {self.shape[0]} rows; download the checkpoint again."
            )
        return scales[mx.arange(start, stop) // rows_each][:, None] / NVFP4_TOP


class FP8(Matrix):
    """``w = e4m3(weight) * scale``, with one scale for a block, a row, a group of columns in a row, or the matrix.

    Scales are floats, or the exponents of powers of two (E8M0) as one byte each.
    """

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        suffix = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        weight, self._scale = self.parts["weight"], self.parts[suffix]
        self.shape = weight.matrix
        if weight.dtype != "F8_E4M3" or self._scale.dtype not in (*FLOATS, *EXPONENTS):
            named = " (int-quantized, W8A8)" if weight.dtype == "I8" else ""
            raise WeightsError(
                f"{weight.name} is {weight.dtype} with {suffix} in {self._scale.dtype}{named}, but only F8_E4M3 with a "
                "float scale is supported; use the float, FP8 or int4 form of the checkpoint."
            )
        self._blocks, self._block = self._cut(quantization.fp8_blocks(of.raw))

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        w = mx.from_fp8(files.read(self.parts["weight"], start, stop), mx.float32)
        stored = files.read(self._scale).reshape(self._blocks)
        # The exponent of a float32 has the same offset.
        is_exponent = self._scale.dtype in EXPONENTS
        scales = (stored.astype(mx.uint32) << 23).view(mx.float32) if is_exponent else stored.astype(mx.float32)
        by_row = scales[mx.arange(start, stop) // self._block[0]]
        return w * mx.repeat(by_row, self._block[1], axis=1)[:, : self.shape[1]]

    def _cut(self, named: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Blocks in each direction and the size of one, which config.json may name, or the shape of the scales tells."""
        rows, cols = self.shape
        shape, count = self._scale.matrix, math.prod(self._scale.shape)
        for block in named:
            blocks = -(-rows // block[0]), -(-cols // block[1])
            if blocks == shape:
                return blocks, block
        if count == 1:
            return (1, 1), (rows, cols)
        if count == rows:
            return (rows, 1), (1, cols)
        if shape[0] == rows and shape[1] and cols % shape[1] == 0:
            return shape, (1, cols // shape[1])
        raise WeightsError(
            f"{self._scale.name} {self._scale.shape} does not cut {self.shape} into blocks of "
            f"{' or '.join(map(str, named)) or 'equal size'}; correct config.json, or download the checkpoint again."
        )


class Stack(Matrix):
    """Experts one below the other, all of one shape; packed as they are if all have one setting."""

    def __init__(self, experts: Sequence[Matrix]) -> None:
        self._experts, self._rows = list(experts), experts[0].shape[0]
        self.shape = (self._rows * len(experts), experts[0].shape[1])
        settings = {e.setting for e in experts}
        self.setting = settings.pop() if len(settings) == 1 else None
        self.dtype, self.scale_dtype = _widest([e.dtype for e in experts]), _widest([e.scale_dtype for e in experts])
        self.is_integer = any(e.is_integer for e in experts)

    @property
    def files(self) -> set[Path]:
        return set().union(*(e.files for e in self._experts))

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        return mx.concatenate([e.read(files, a, b) for e, a, b in self._pieces(start, stop)])

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        pieces = [e.read_packed(files, a, b) for e, a, b in self._pieces(start, stop)]
        return {suffix: mx.concatenate([p[suffix] for p in pieces]) for suffix in pieces[0]}

    def _pieces(self, start: int, stop: int) -> list[tuple[Matrix, int, int]]:
        n = self._rows
        return [
            (self._experts[e], max(start - e * n, 0), min(stop - e * n, n)) for e in range(start // n, -(-stop // n))
        ]


def _widest(dtypes: Sequence[mx.Dtype | None]) -> mx.Dtype | None:
    """The type that holds all of these, None if one is None."""
    known = [d for d in dtypes if d is not None]
    if len(known) < len(dtypes):
        return None
    return known[0] if len(set(known)) == 1 else mx.float32
