"""What a source's tensors mean: each format as a matrix whose rows can be read in float.

Plain       bfloat16, float16 or float32
MLXPacked   weight, scales and biases of an mlx-community conversion
BlockFP8    weight in float8 e4m3 and weight_scale_inv (or weight_scale) for each block
GPTQ        qweight, qzeros, scales, and g_idx with desc_act
Compressed  weight_packed, weight_scale, and weight_zero_point or weight_g_idx
Stack       one of these for each expert
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import FLOATS
from ring_mlx.convert.settings import AFFINE_BITS, AFFINE_GROUPS, MODES, Setting
from ring_mlx.errors import WeightsError

Parts = Mapping[str, Tensor]
WORDS, INDICES = ("I32", "U32"), ("I32", "I64", "U32")


class Matrix:
    """Rows of a source matrix.

    ``shape`` is (rows, cols), ``setting`` the MLX format that holds it without loss, if there is one, ``dtype`` the
    float type of the source where there is one, and ``is_integer`` whether the source holds integers on a grid.
    """

    shape: tuple[int, int]
    setting: Setting | None = None
    is_integer = False
    dtype: mx.Dtype | None = None

    def __init__(self, parts: Parts) -> None:
        self.parts = dict(parts)

    @property
    def files(self) -> set[Path]:
        """The shards that hold it."""
        return {t.file for t in self.parts.values()}

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows in float, [stop - start, cols]."""
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
    """Floats as they are."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        (self._tensor,) = self.parts.values()
        if self._tensor.dtype not in FLOATS:
            raise WeightsError(
                f"{self._tensor.name} has dtype {self._tensor.dtype} and nothing that scales it; use another form of "
                "the checkpoint."
            )
        self.shape, self.dtype = self._tensor.matrix, FLOATS[self._tensor.dtype]

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows in the source's dtype."""
        return files.read(self._tensor, start, stop)


class MLXPacked(Matrix):
    """MLX's own packing."""

    def __init__(self, parts: Parts, setting: Setting) -> None:
        super().__init__(parts)
        weight, affine = self.parts["weight"], setting.mode == "affine"
        exists = setting.bits in AFFINE_BITS and setting.group_size in AFFINE_GROUPS
        if not (exists if affine else MODES.get(setting.mode) == (setting.group_size, setting.bits)):
            raise WeightsError(
                f"{weight.name} has {setting.bits} bits in groups of {setting.group_size} ({setting.mode}), which MLX "
                "does not have; convert the original."
            )
        rows, words = weight.matrix
        self.shape, self.setting = (rows, words * 32 // setting.bits), setting
        groups = self.parts["scales"].matrix
        if groups != (rows, self.shape[1] // setting.group_size):
            raise WeightsError(
                f"{self.parts['scales'].name} {groups} does not fit {setting.bits} bits in groups of "
                f"{setting.group_size}, which config.json names; download the checkpoint again."
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

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows dequantised in float32."""
        assert self.setting is not None
        p = self.read_packed(files, start, stop)
        s, (scales, biases) = self.setting, (p["scales"], p.get("biases"))
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(p["weight"], scales, biases, s.group_size, s.bits, s.mode, dtype=mx.float32)

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        """Rows as stored."""
        return {suffix: files.read(t, start, stop) for suffix, t in self.parts.items()}


class BlockFP8(Matrix):
    """``w = e4m3(weight) * scale`` of the block, whose size follows from the two shapes."""

    def __init__(self, parts: Parts, scale: str, block: Sequence[int]) -> None:
        super().__init__(parts)
        self.shape = self.parts["weight"].matrix
        self._scale, self._block = self.parts[scale], (int(block[0]), int(block[1]))
        if self.parts["weight"].dtype != "F8_E4M3" or self._scale.dtype not in FLOATS:
            raise WeightsError(
                f"{self.parts['weight'].name} is {self.parts['weight'].dtype} with {scale} in {self._scale.dtype}, but "
                "only F8_E4M3 with a float scale is supported; use another form of the checkpoint."
            )
        if min(self._block) < 1:
            raise WeightsError(f"weight_block_size {list(block)} is not two sizes above 0; correct config.json.")
        expected = tuple(-(-n // b) for n, b in zip(self.shape, self._block, strict=True))
        if self._scale.nbytes != expected[0] * expected[1] * self._scale.element_bytes:
            raise WeightsError(
                f"{self._scale.name} {self._scale.shape} does not cut {self.shape} into blocks of {self._block}; "
                "download the checkpoint again."
            )
        self._blocks = expected

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows in float32."""
        w = mx.from_fp8(files.read(self.parts["weight"], start, stop), mx.float32)
        scales = files.read(self._scale).astype(mx.float32).reshape(self._blocks)
        by_row = scales[mx.arange(start, stop) // self._block[0]]
        return w * mx.repeat(by_row, self._block[1], axis=1)[:, : self.shape[1]]


@dataclass(frozen=True)
class Grid:
    """Integer codes [n, cols], scales and zero points [n, groups] in float32: ``w = scale * (code - zero)``."""

    codes: mx.array
    scales: mx.array
    zeros: mx.array


class Packed(Matrix):
    """Integers on a grid for each group of columns; subclasses unpack them."""

    is_integer = True
    bits: int
    group_size: int
    by_column: Tensor | None

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """The grid of some rows."""
        raise NotImplementedError

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows in float32."""
        g, groups = self.grid(files, start, stop), mx.arange(self.shape[1]) // self.group_size
        if self.by_column is not None:
            # compressed-tensors stores -1 where columns keep their order.
            order = files.read(self.by_column).reshape(-1).astype(mx.int64)
            lowest, highest = -1 if "weight_g_idx" in self.parts else 0, g.scales.shape[1] - 1
            first, last = int(order.min()), int(order.max())
            if first < lowest or last > highest:
                raise WeightsError(
                    f"{self.by_column.name} names groups {first} to {last}, but there are {highest + 1}; download the "
                    "checkpoint again."
                )
            groups = mx.where(order < 0, groups, order)
        return g.scales[:, groups] * (g.codes.astype(mx.float32) - g.zeros[:, groups])

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        """The same grid in MLX's form, where ``w = scale * code + bias``."""
        self._check_order(files)
        g = self.grid(files, start, stop)
        return {"weight": pack(g.codes, self.bits), "scales": g.scales, "biases": -g.scales * g.zeros}

    def _set(self, shape: tuple[int, int], bits: int, groups: int) -> None:
        self.shape, self.bits, self.group_size = shape, bits, shape[1] // max(1, groups)
        whole = 0 < self.group_size * groups == shape[1]
        if bits not in (2, 4, 8) or not whole:
            raise WeightsError(
                f"{min(t.name for t in self.parts.values())} has {bits} bits in {groups} groups of {shape[1]} columns, "
                "which is not supported; use another form of the checkpoint."
            )
        if self.by_column is None and self.group_size in (32, 64, 128):
            self.setting = Setting(self.group_size, bits)

    def _check_order(self, files: TensorFiles) -> None:
        order = self.parts.get("g_idx")
        if order is None:
            return
        plain = mx.arange(self.shape[1]) // self.group_size
        if not mx.array_equal(files.read(order).reshape(-1), plain).item():
            raise WeightsError(
                f"{order.name} mixes columns of different groups although config.json says desc_act false; correct it "
                "and add -q to requantise."
            )


class GPTQ(Packed):
    """qweight packs inputs [in / n, out], qzeros packs outputs [groups, out / n]; version 1 stores ``zero - 1``."""

    def __init__(self, parts: Parts, config: Mapping[str, Any]) -> None:
        super().__init__(parts)
        bits = int(config.get("bits", 4))
        words, out = self.parts["qweight"].matrix
        self._offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        groups = self.parts["scales"].matrix[0]
        cols = words * 32 // bits
        self.by_column = self.parts.get("g_idx") if config.get("desc_act") else None
        self._set((out, cols), bits, groups)
        self._expect("qweight", (words, out), WORDS)
        self._expect("qzeros", (groups, -(-out * bits // 32)), WORDS)
        self._expect("scales", (groups, out), FLOATS)
        if "g_idx" in self.parts:
            self._expect("g_idx", (1, cols), INDICES)

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """Unpacked and transposed."""
        codes = unpack(files.read(self.parts["qweight"]).T[start:stop], self.bits)
        zeros = unpack(files.read(self.parts["qzeros"]), self.bits).T[start:stop] + self._offset
        scales = files.read(self.parts["scales"]).T[start:stop].astype(mx.float32)
        # A zero point of 0 is stored as all ones, which plus one wraps.
        return Grid(codes, scales, (zeros & ((1 << self.bits) - 1)).astype(mx.float32))


class Compressed(Packed):
    """weight_packed [out, in / n] holds ``code + 2^(bits-1)``; zero points, if any, pack outputs [out / n, groups]."""

    def __init__(self, parts: Parts, bits: int) -> None:
        super().__init__(parts)
        rows, words = self.parts["weight_packed"].matrix
        self.by_column = self.parts.get("weight_g_idx")
        groups = self.parts["weight_scale"].matrix[1]
        self._set((rows, words * 32 // bits), bits, groups)
        self._expect("weight_packed", (rows, words), WORDS)
        self._expect("weight_scale", (rows, groups), FLOATS)
        if "weight_zero_point" in self.parts:
            self._expect("weight_zero_point", (-(-rows * bits // 32), groups), WORDS)
        if self.by_column is not None:
            self._expect("weight_g_idx", (1, self.shape[1]), INDICES)

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """Unpacked; a symmetric format's zero point is the middle code."""
        codes = unpack(files.read(self.parts["weight_packed"], start, stop), self.bits)
        scales = files.read(self.parts["weight_scale"], start, stop).astype(mx.float32)
        if "weight_zero_point" in self.parts:
            packed = files.read(self.parts["weight_zero_point"])
            zeros = unpack(packed.T, self.bits).T[start:stop].astype(mx.float32)
        else:
            zeros = mx.full(scales.shape, 1 << (self.bits - 1), dtype=mx.float32)
        return Grid(codes, scales, zeros)


class Stack(Matrix):
    """Experts one below the other; all of one kind and shape."""

    def __init__(self, experts: Sequence[Matrix]) -> None:
        self._experts, first = list(experts), experts[0]
        self._rows = first.shape[0]
        self.shape = (self._rows * len(experts), first.shape[1])
        self.setting, self.dtype, self.is_integer = first.setting, first.dtype, first.is_integer

    @property
    def files(self) -> set[Path]:
        """The shards of all experts."""
        return set().union(*(e.files for e in self._experts))

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        """Rows of the experts that they fall into."""
        return mx.concatenate([e.read(files, a, b) for e, a, b in self._pieces(start, stop)])

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        """As `read`, packed."""
        pieces = [e.read_packed(files, a, b) for e, a, b in self._pieces(start, stop)]
        return {suffix: mx.concatenate([p[suffix] for p in pieces]) for suffix in pieces[0]}

    def _pieces(self, start: int, stop: int) -> list[tuple[Matrix, int, int]]:
        n = self._rows
        return [
            (self._experts[e], max(start - e * n, 0), min(stop - e * n, n)) for e in range(start // n, -(-stop // n))
        ]


def unpack(words: mx.array, bits: int) -> mx.array:
    """Codes [n, m * 32 / bits] uint32 of words [n, m], lowest bits first; bits divides 32."""
    shifts = mx.arange(0, 32, bits).astype(mx.uint32)
    words = words.view(mx.uint32) if words.dtype == mx.int32 else words
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """MLX's packing of codes [n, cols] to words [n, cols * bits / 32]: one stream of bits, lowest first."""
    groups = codes.astype(mx.uint32).reshape(codes.shape[0], -1, 32)
    words = [mx.zeros(groups.shape[:2], mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (groups[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (groups[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)
