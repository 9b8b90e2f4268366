"""Matrices of integers on a grid for each group of columns, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.checkpoint.weights import FLOATS
from ring_mlx.convert.grids import pack, unpack, unpack_stream
from ring_mlx.convert.matrices import Matrix, Parameter, Parts
from ring_mlx.convert.recipes import AFFINE_BITS, AFFINE_GROUPS, Setting
from ring_mlx.errors import WeightsError
from ring_mlx.model import quantization

WORDS, INDICES = ("I32", "U32"), ("I32", "I64", "U32")
MOST_BITS = 8
# One in each code of a word, which version 1 of GPTQ takes from words of zero points.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Layout:
    """How codes lie in words: ``words(n, bits)`` that n codes take, and what unpacks them."""

    words: Callable[[int, int], int]
    unpack: Callable[[mx.array, int], mx.array]


STREAM = Layout(lambda n, bits: -(-n * bits // 32), unpack_stream)
WHOLE = Layout(lambda n, bits: -(-n // (32 // bits)), unpack)


@dataclass(frozen=True)
class Grid:
    """Integer codes [n, cols], scales and zero points [n, groups] in float32: ``w = scale * (code - zero)``."""

    codes: mx.array
    scales: mx.array
    zeros: mx.array


class Packed(Matrix):
    """Integers on a grid; subclasses unpack them. ``order`` has the group of each column, if the source names it."""

    is_integer = True
    bits: int
    group_size: int
    order: Tensor | None

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """The grid of some rows."""
        raise NotImplementedError

    def read(self, files: TensorFiles, start: int, stop: int) -> mx.array:
        g = self.grid(files, start, stop)
        groups = self._groups(files, g.scales.shape[1])
        return g.scales[:, groups] * (g.codes.astype(mx.float32) - g.zeros[:, groups])

    def read_packed(self, files: TensorFiles, start: int, stop: int) -> dict[str, mx.array]:
        """The same grid in MLX's form, where ``w = scale * code + bias``; larger groups become several of MLX's."""
        assert self.setting is not None
        g = self.grid(files, start, stop)
        plain = mx.arange(self.shape[1]) // self.group_size
        if not mx.array_equal(self._groups(files, g.scales.shape[1]), plain).item():
            assert self.order is not None
            raise WeightsError(
                f"{self.order.name} mixes columns of different groups although config.json says desc_act false; correct "
                "it and add -q to requantize."
            )
        scales, zeros = (a[:, plain[:: self.setting.group_size]] for a in (g.scales, g.zeros))
        return {"weight": pack(g.codes, self.bits), "scales": scales, "biases": -scales * zeros}

    def _groups(self, files: TensorFiles, count: int) -> mx.array:
        """The group of each column [cols]."""
        plain = mx.arange(self.shape[1]) // self.group_size
        if self.order is None:
            return plain
        # compressed-tensors stores -1 where columns keep their order.
        order = files.read(self.order).reshape(-1).astype(mx.int64)
        lowest = -1 if "weight_g_idx" in self.parts else 0
        first, last = int(order.min()), int(order.max())
        if first < lowest or last >= count:
            raise WeightsError(
                f"{self.order.name} names groups {first} to {last}, but there are {count}; download the checkpoint again."
            )
        return mx.where(order < 0, plain, order)

    def _set(self, shape: tuple[int, int], bits: int, groups: int, group_size: int | None, is_mixed: bool) -> None:
        """Take over a form, whose groups may be fewer columns at the end of a row than ``group_size``."""
        cols = shape[1]
        if not group_size or group_size < 0 or -(-cols // group_size) != groups:
            group_size = cols // groups if groups and cols % groups == 0 else 0
        if not 1 <= bits <= MOST_BITS or not group_size:
            self._refuse(bits, groups, cols)
        self.shape, self.bits, self.group_size = shape, bits, group_size
        if not is_mixed and bits in AFFINE_BITS:
            fitting = [g for g in AFFINE_GROUPS if group_size % g == 0 and cols % g == 0]
            self.setting = Setting(max(fitting), bits) if fitting else None

    def _refuse(self, bits: int, groups: int, cols: int) -> None:
        raise WeightsError(
            f"{min(t.name for t in self.parts.values())} has {bits} bits in {groups} groups of {cols} columns, which is "
            "not supported; use another form of the checkpoint."
        )


class GPTQ(Packed):
    """qweight packs inputs [in * bits / 32, out], qzeros packs outputs [groups, out * bits / 32].

    Version 1 stores ``zero - 1``. With 2, 4 and 8 bits it subtracts from words, so that a zero of 0 borrows from the
    codes above it; with 3 bits from each code.
    """

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        (words, out), groups = self.parts["qweight"].matrix, self.parts["scales"].matrix[0]
        bits, group_size, is_mixed, self._is_first = quantization.gptq_settings(of.raw, words, of.cols)
        cols, rest = divmod(words * 32, bits)
        if rest or bits not in (2, 3, 4, 8):
            self._refuse(bits, groups, cols)
        self.order = self.parts.get("g_idx")
        self._set((out, cols), bits, groups, group_size, is_mixed)
        self._expect("qweight", (words, out), WORDS)
        self._expect("qzeros", (groups, -(-out * bits // 32)), WORDS)
        self._expect("scales", (groups, out), FLOATS)
        if self.order is not None:
            self._expect("g_idx", (1, cols), INDICES)

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        codes = unpack_stream(files.read(self.parts["qweight"]).T[start:stop], self.bits)
        words = files.read(self.parts["qzeros"]).view(mx.uint32)
        if self._is_first and self.bits in ONES:
            words = words + mx.array(ONES[self.bits], dtype=mx.uint32)
        zeros = unpack_stream(words, self.bits).T[start:stop]
        if self._is_first and self.bits not in ONES:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        scales = files.read(self.parts["scales"]).T[start:stop].astype(mx.float32)
        return Grid(codes, scales, zeros.astype(mx.float32))


class Compressed(Packed):
    """weight_packed [out, words] holds ``code + 2^(bits-1)``; zero points, if any, pack outputs [words, groups].

    Where 32 is no multiple of the bits, newer versions pack one stream of bits, older ones whole codes in each word.
    A zero point that is not packed is an int8 of the shape of the scales; one scale may stand for all rows.
    """

    def __init__(self, parts: Parts, of: Parameter) -> None:
        super().__init__(parts)
        rows, words = self.parts["weight_packed"].matrix
        scale, self.order = self.parts["weight_scale"], self.parts.get("weight_g_idx")
        groups = scale.matrix[1]
        bits, group_size, cols, layout = self._form(words, groups, of)
        self._unpack = layout.unpack
        self._set((rows, cols), bits, groups, group_size, self.order is not None)
        self._expect("weight_packed", (rows, words), WORDS)
        scale_rows = 1 if scale.matrix == (1, 1) else rows
        self._expect("weight_scale", (scale_rows, groups), FLOATS)
        if zero := self.parts.get("weight_zero_point"):
            is_plain = zero.dtype == "I8"
            shape = (scale_rows if is_plain else layout.words(scale_rows, bits), groups)
            self._expect("weight_zero_point", shape, ("I8",) if is_plain else WORDS)
        if self.order is not None:
            self._expect("weight_g_idx", (1, cols), INDICES)

    def grid(self, files: TensorFiles, start: int, stop: int) -> Grid:
        """As `Packed.grid`; a symmetric format's zero point is the middle code."""
        codes = self._unpack(files.read(self.parts["weight_packed"], start, stop), self.bits)[:, : self.shape[1]]
        scales = self._rows(files.read(self.parts["weight_scale"]), start, stop)
        middle, zero = 1 << (self.bits - 1), self.parts.get("weight_zero_point")
        if zero is None:
            return Grid(codes, scales, mx.full(scales.shape, middle, dtype=mx.float32))
        stored = files.read(zero)
        zeros = stored.astype(mx.float32) + middle if zero.dtype == "I8" else self._unpack(stored.T, self.bits).T
        return Grid(codes, scales, self._rows(zeros, start, stop))

    def _rows(self, array: mx.array, start: int, stop: int) -> mx.array:
        """Rows of an array that may have one for all."""
        rows = array if array.shape[0] == 1 else array[start:stop]
        return mx.broadcast_to(rows, (stop - start, array.shape[1])).astype(mx.float32)

    def _form(self, words: int, groups: int, of: Parameter) -> tuple[int, int | None, int, Layout]:
        """Bits, group size, columns and layout: of the first scheme in config.json that fits the shapes, else any."""
        schemes = quantization.compressed_schemes(of.raw)
        fitting = [
            (bits, size, of.cols, layout)
            for bits, size in schemes
            for layout in (STREAM, WHOLE)
            if of.cols and layout.words(of.cols, bits) == words
        ]
        by_group = [form for form in fitting if form[1] and -(-of.cols // form[1]) == groups]
        bits, size = schemes[0]
        return next(iter([*by_group, *fitting]), (bits, size, words * 32 // bits, STREAM))
