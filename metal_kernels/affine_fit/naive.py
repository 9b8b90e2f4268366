"""The fit of affine scales and biases in NumPy, in blocks that stay in a processor's cache; what a CPU runs."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Weights of a part, whose arrays of 4 bytes a weight stay in a cache of 2 MB while it is gone through, and parts of a block,
# whose groups go through the rest together: a call of NumPy costs as much as a thousand numbers.
PART_WEIGHTS, PARTS = 1 << 17, 4
# A group's weights become integers below this; scales and biases get so many more bits when an error is counted.
MOST, FRACTION_BITS = 32767, 9
# Groups of a range below 2^-85 are scaled up no further, so that scales stay normal numbers.
MOST_SHIFT = 100
# The least step that mx.quantize takes.
LEAST_STEP = np.float32(1e-7)
# A scale times the highest code, and a bias, beyond which nothing fits a group, and a scale too small for any.
FARTHEST, LEAST_SCALE = np.float32(4 * (MOST + 1)), np.float32(2.0**-12)


class Effort(NamedTuple):
    """How long is searched.

    Attributes:
        starts: By how many tenths of a step the low and the high end of a group's range are drawn in, for each start.
        rounds: How often the best is improved.
    """

    starts: tuple[tuple[int, int], ...]
    rounds: int


def naive_affine_fit(
    w: mx.array, bits: int, group_size: int, dtype: mx.Dtype, effort: Effort
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize to the scale s and bias b of each group that a search for the least squared error finds.

    ::

        X = (w - c) 2^k in integers of 15 bits and a sign, k and c by group; c is 0 in a range about 0
        for (s, b): q = clip(round((X - b) / s), 0, 2^bits - 1),  E = sum_i (X_i - s q_i - b)^2
        (s, b) first as `mx.quantize` has them; then from ranges whose ends are drawn in as effort.starts says; then, in
        effort.rounds, the best so far. After each comes argmin E(s, b) for the same q. The least E of all is kept.

    A scale or bias is rounded to ``dtype`` before its E is counted, except in those ranges, which are only starts. Sums are of
    integers, and a float32 product that is added to anything is exact or rounded before: so every device gives the same bits.

    Args:
        w: [N, K] float.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128 columns.
        dtype: Of scales and biases.
        effort: How long is searched.

    Returns:
        Words [N, K * bits / 32] uint32, scales and biases [N, K / group_size] of ``dtype``, as of `mx.quantize`.

    Source: Lloyd's alternation on a uniform grid. Half-quadratic quantization (HQQ, Badri and Shaji 2023) alternates
    likewise under another norm.
    """
    rows = w.shape[0]
    groups = _host(w).reshape(-1, group_size)
    words = np.empty((len(groups), group_size * bits // 32), np.uint32)
    scales, biases = (np.empty(len(groups), np.float32) for _ in range(2))

    workers, block = os.cpu_count() or 1, PARTS * max(1, PART_WEIGHTS // group_size)

    def fit(worker: int) -> None:
        room = _Room.of(group_size)
        for start in range(worker * block, len(groups), workers * block):
            part = slice(start, start + block)
            words[part], scales[part], biases[part] = _fit(groups[part], bits, dtype, effort, room)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fit, range(workers)))
    scale, bias = (mx.array(a.reshape(rows, -1)).astype(dtype) for a in (scales, biases))
    return mx.array(words.reshape(rows, -1)), scale, bias


def _host(w: mx.array) -> npt.NDArray[Any]:
    """The weights where NumPy sees them; bfloat16 as its bits."""
    return np.asarray(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w)


class _Room(NamedTuple):
    """Memory for a block, used again and again: new pages would cost more than the work in them.

    ``x`` and ``X`` [parts, n, groups of a part], ``q`` and ``scratch`` of one part.
    """

    x: Floats
    X: Ints
    q: Ints
    scratch: Ints

    @classmethod
    def of(cls, group_size: int) -> _Room:
        part = group_size, max(1, PART_WEIGHTS // group_size)
        whole = PARTS, *part
        return cls(
            np.empty(whole, np.float32), np.empty(whole, np.int32), np.empty(part, np.int32), np.empty(part, np.int32)
        )

    def part(self, i: int, groups: int) -> _Room:
        """Of a part: [n, groups] each."""
        return _Room(self.x[i, :, :groups], self.X[i, :, :groups], self.q[:, :groups], self.scratch[:, :groups])


def _fit(
    w: npt.NDArray[Any], bits: int, dtype: mx.Dtype, effort: Effort, room: _Room
) -> tuple[npt.NDArray[np.uint32], Floats, Floats]:
    """Words [G, n * bits / 32], scales and biases [G] of groups [G, n]."""
    with np.errstate(all="ignore"):  # values that are not finite are refused elsewhere
        search = _Search(w, bits, dtype, room)
        search.start(effort)
        for _ in range(effort.rounds):
            search.improve(search.s[None], search.b[None])
        return search.words(), search.s * search.down, search.b * search.down + search.zero


class _Search:
    """Groups [G, n] on their way: their weights as integers ``X`` and the same in float, and the best ``s`` and ``b`` [G] so far in
    units of X."""

    def __init__(self, w: npt.NDArray[Any], bits: int, dtype: mx.Dtype, room: _Room) -> None:
        self.bits, self.top, self.dtype, self.n = bits, (1 << bits) - 1, dtype, w.shape[1]
        size = room.q.shape[1]
        places = [slice(start, min(start + size, len(w))) for start in range(0, len(w), size)]
        self.parts = [(at, room.part(i, at.stop - at.start)) for i, at in enumerate(places)]
        self.first, self.last = (np.empty(len(w), np.float32) for _ in range(2))
        self.sum = np.empty(len(w), np.int32)
        for at, part in self.parts:
            if w.dtype == np.uint16:
                np.left_shift(w[at].T, np.uint32(16), out=part.x.view(np.uint32))
            else:
                part.x[:] = w[at].T
            np.minimum.reduce(part.x, axis=0, out=self.first[at])
            np.maximum.reduce(part.x, axis=0, out=self.last[at])
        self.zero: Floats = np.minimum(np.maximum(self.first, np.float32(0)), self.last)
        largest = np.maximum(self.last - self.zero, self.zero - self.first)
        shift = np.minimum(15 - ((largest.view(np.int32) >> 23) - 126), MOST_SHIFT)
        self.up: Floats = ((127 + shift) << 23).view(np.float32)
        self.down: Floats = ((127 - shift) << 23).view(np.float32)
        for at, part in self.parts:
            np.subtract(part.x, self.zero[at], out=part.x)
            np.multiply(part.x, self.up[at], out=part.x)
            np.clip(np.rint(part.x, out=part.x), -MOST, MOST, out=part.x)
            np.copyto(part.X, part.x, casting="unsafe")
            np.add.reduce(part.X, axis=0, out=self.sum[at])
        ends = np.rint((np.stack([self.first, self.last]) - self.zero) * self.up)
        self.low, self.high = np.clip(ends, -MOST, MOST).astype(np.int32)

    def start(self, effort: Effort) -> None:
        """Begin with what `mx.quantize` would take, and with the ranges."""
        self.s, self.b = self._mlxs()
        self.least = np.full(len(self.s), np.iinfo(np.int64).max)
        low, high = np.array(effort.starts, np.int32).T[..., None]
        across, whole = np.maximum(self.high - self.low, 1), 10 * self.top
        s = (across * (whole - low - high)).astype(np.float32) / np.float32(whole * self.top)
        b = self.low.astype(np.float32) + (across * low).astype(np.float32) / np.float32(whole)
        s, b = np.concatenate([self.s[None], s]), np.concatenate([self.b[None], b])
        sums = self._sums(s, b)
        self._keep(s[:1], b[:1], sums[:, :1])
        self._keep(*self._least_squares(s, sums), sums)

    def _mlxs(self) -> tuple[Floats, Floats]:
        """What `mx.quantize` would take."""
        low, high = self._rounded(self.first), self._rounded(self.last)
        is_low = np.abs(low) > np.abs(high)
        edge, s = np.where(is_low, low, high), np.maximum((high - low) / np.float32(self.top), LEAST_STEP)
        s = np.where(is_low, s, -s)
        steps = np.rint(edge / s)
        s = self._rounded(np.where(steps == 0, s, edge / steps)) * self.up
        return s, (np.where(steps == 0, np.float32(0), edge) - self.zero) * self.up

    def improve(self, s: Floats, b: Floats) -> None:
        """Take the codes of each (s, b) of s and b [starts, G], and keep the best of their least squares."""
        sums = self._sums(s, b)
        self._keep(*self._least_squares(s, sums), sums)

    def words(self) -> npt.NDArray[np.uint32]:
        """Codes of the best as MLX packs them [G, n * bits / 32]: one stream of bits, lowest first."""
        packed, lines = np.empty((len(self.s), self.n * self.bits // 8), np.uint8), self._lines(self.s, self.b)
        for at, part in self.parts:
            self._codes(part, lines[0][at], lines[1][at])
            q = part.q.astype(np.uint8).reshape(self.n // 8, 8, -1)
            bytes_ = np.zeros((self.n // 8, self.bits, q.shape[-1]), np.uint8)
            for i in range(8):
                byte, shift = divmod(i * self.bits, 8)
                bytes_[:, byte] |= q[:, i] << shift
                if shift + self.bits > 8:
                    bytes_[:, byte + 1] |= q[:, i] >> (8 - shift)
            packed[at] = bytes_.reshape(-1, q.shape[-1]).T
        return packed.view("<u4")

    def _rounded(self, v: Floats) -> Floats:
        """As scales and biases are stored."""
        if self.dtype == mx.bfloat16:
            units = v.view(np.uint32)
            return ((units + 0x7FFF + ((units >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return v.astype(np.float16).astype(np.float32) if self.dtype == mx.float16 else v

    def _lines(self, s: Floats, b: Floats) -> tuple[Floats, Floats]:
        """Of codes ``int((X - start) inverse)``, cut off: start and inverse; all codes are 0 where (s, b) cannot be used."""
        is_used = self._fits(s, b) & (np.abs(s) >= LEAST_SCALE)
        return np.where(is_used, b - s * np.float32(0.5), 0), np.where(is_used, 1 / s, 0)

    def _codes(self, part: _Room, start: Floats, inverse: Floats) -> None:
        """Into ``q``."""
        exact = part.scratch.view(np.float32)
        np.subtract(part.x, start, out=exact)
        np.multiply(exact, inverse, out=exact)
        np.copyto(part.q, exact, casting="unsafe")
        part.q.clip(0, self.top, out=part.q)

    def _sums(self, s: Floats, b: Floats) -> Ints:
        """Of the codes of each (s, b), of their squares, and of their products with X [3, starts, G]."""
        sums, (start, inverse) = np.empty((3, *s.shape), np.int32), self._lines(s, b)
        for at, part in self.parts:
            for i in range(len(s)):
                self._codes(part, start[i, at], inverse[i, at])
                np.add.reduce(part.q, axis=0, out=sums[0, i, at])
                np.add.reduce(np.multiply(part.q, part.q, out=part.scratch), axis=0, out=sums[1, i, at])
                np.add.reduce(np.multiply(part.q, part.X, out=part.scratch), axis=0, out=sums[2, i, at])
        return sums

    def _least_squares(self, s: Floats, sums: Ints) -> tuple[Floats, Floats]:
        """The stored scale and bias that suit the codes best; the old scale where the codes do not vary."""
        q, qq, qx = sums
        variance = self.n * qq - q * q
        covariance = self.n * qx.astype(np.int64) - self.sum.astype(np.int64) * q
        found = covariance.astype(np.float32) / variance.astype(np.float32)
        s = self._rounded(np.where((variance > 0) & (covariance != 0), found, s) * self.down) * self.up
        b = (self.sum.astype(np.float32) - np.rint(s * q.astype(np.float32))) / np.float32(self.n)
        return s, (self._rounded(b * self.down + self.zero) - self.zero) * self.up

    def _keep(self, s: Floats, b: Floats, sums: Ints) -> None:
        """Take the (s, b) whose codes' squared error, but for the sum of X squared, is the least so far."""
        q, qq, qx = sums.astype(np.int64)
        one = 1 << FRACTION_BITS
        S, B = (np.rint(v * np.float32(one)).astype(np.int64) for v in (s, b))
        error = S * (S * qq + 2 * (B * q - one * qx)) + B * (self.n * B - 2 * one * self.sum.astype(np.int64))
        error = np.where(self._fits(s, b), error, np.iinfo(np.int64).max)
        best = error.argmin(axis=0), np.arange(len(self.s))
        s, b, error = s[best], b[best], error[best]
        is_better = error < self.least
        self.s, self.b = np.where(is_better, s, self.s), np.where(is_better, b, self.b)
        self.least = np.where(is_better, error, self.least)

    def _fits(self, s: Floats, b: Floats) -> npt.NDArray[np.bool_]:
        return (np.abs(s) * np.float32(self.top) <= FARTHEST) & (np.abs(b) <= FARTHEST)
