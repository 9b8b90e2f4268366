"""Matrices of integers on a grid for each group of columns, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import FLOATS
from ring_mlx.convert.matrices import Matrix, Parameter, Parts
from ring_mlx.convert.recipes import AFFINE_GROUPS, Setting
from ring_mlx.errors import WeightsError
from ring_mlx.model import quantization

WORDS, INDICES = ("I32", "U32"), ("I32", "I64", "U32")


@dataclass(frozen=True)
class Grid:
    """Integer codes [n, cols], scales and zero points [n, groups] in float32: ``w = scale * (code - zero)``."""

    codes: mx.array
    scales: mx.array
    zeros: mx.array


class Packed(Matrix):
    """Integers on a grid; subclasses unpack them."""

    is_integer = True
    bits: int
    group_size: int
    by_column: Tensor | None

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """The grid of some rows."""
        raise NotImplementedError

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
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
        order = self.parts.get("g_idx")
        plain = mx.arange(self.shape[1]) // self.group_size
        if order is not None and not mx.array_equal(files.read(order).reshape(-1), plain).item():
            raise WeightsError(
                f"{order.name} mixes columns of different groups although config.json says desc_act false; correct it "
                "and add -q to requantize."
            )
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
        if self.by_column is None and self.group_size in AFFINE_GROUPS:
            self.setting = Setting(self.group_size, bits)


class GPTQ(Packed):
    """qweight packs inputs [in / n, out], qzeros packs outputs [groups, out / n]; version 1 stores ``zero - 1``."""

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        bits, is_mixed, self._offset = quantization.gptq_settings(of.raw)
        words, out = self.parts["qweight"].matrix
        groups, cols = self.parts["scales"].matrix[0], words * 32 // bits
        self.by_column = self.parts.get("g_idx") if is_mixed else None
        self._set((out, cols), bits, groups)
        self._expect("qweight", (words, out), WORDS)
        self._expect("qzeros", (groups, -(-out * bits // 32)), WORDS)
        self._expect("scales", (groups, out), FLOATS)
        if "g_idx" in self.parts:
            self._expect("g_idx", (1, cols), INDICES)

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        codes = unpack(files.read(self.parts["qweight"]).T[start:stop], self.bits)
        zeros = unpack(files.read(self.parts["qzeros"]), self.bits).T[start:stop] + self._offset
        scales = files.read(self.parts["scales"]).T[start:stop].astype(mx.float32)
        # A zero point of 0 is stored as all ones, which plus one wraps.
        return Grid(codes, scales, (zeros & ((1 << self.bits) - 1)).astype(mx.float32))


class Compressed(Packed):
    """weight_packed [out, in / n] holds ``code + 2^(bits-1)``; zero points, if any, pack outputs [out / n, groups]."""

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        bits = quantization.compressed_bits(of.raw)
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
        """As `Packed.grid`; a symmetric format's zero point is the middle code."""
        codes = unpack(files.read(self.parts["weight_packed"], start, stop), self.bits)
        scales = files.read(self.parts["weight_scale"], start, stop).astype(mx.float32)
        if "weight_zero_point" in self.parts:
            packed = files.read(self.parts["weight_zero_point"])
            zeros = unpack(packed.T, self.bits).T[start:stop].astype(mx.float32)
        else:
            zeros = mx.full(scales.shape, 1 << (self.bits - 1), dtype=mx.float32)
        return Grid(codes, scales, zeros)


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
