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

# Weights of a block: its five arrays of 4 bytes a weight stay in a cache of 2 MB.
BLOCK_WEIGHTS = 1 << 16
# A group's weights become integers below this; scales and biases get so many more bits when an error is counted.
MOST, FRACTION_BITS = 32767, 9
# Groups of a range below 2^-85 are scaled up no further, so that scales stay normal numbers.
MOST_SHIFT = 100
# The least step that mx.quantize takes.
LEAST_STEP = np.float32(1e-7)
# A scale times the highest code, and a bias, beyond which nothing fits a group.
FARTHEST = 4.0 * (MOST + 1)


class Effort(NamedTuple):
    """How long is searched.

    Attributes:
        ends: Places of each end of a group's range at which the search starts; all pairs are tried.
        tenths: The distance between two such places, in tenths of the range's step.
        rounds: How often the best is improved.
    """

    ends: int
    tenths: int
    rounds: int


def naive_affine_fit(
    w: mx.array, bits: int, group_size: int, dtype: mx.Dtype, effort: Effort
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize to the scale s and bias b of each group that a search for the least squared error finds.

    ::

        X = (w - c) 2^k in integers of 15 bits and a sign, k and c by group; c is 0 in a range about 0
        for (s, b): q = clip(round((X - b) / s), 0, 2^bits - 1),  E = sum_i (X_i - s q_i - b)^2
        (s, b) first as `mx.quantize` has them; then from effort.ends^2 ranges, whose ends are drawn in; then, in
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

    def fit(start: int) -> None:
        part = slice(start, start + BLOCK_WEIGHTS // group_size)
        words[part], scales[part], biases[part] = _fit(groups[part], bits, dtype, effort)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fit, range(0, len(groups), BLOCK_WEIGHTS // group_size)))
    scale, bias = (mx.array(a.reshape(rows, -1)).astype(dtype) for a in (scales, biases))
    return mx.array(words.reshape(rows, -1)), scale, bias


def _host(w: mx.array) -> npt.NDArray[Any]:
    """The weights where NumPy sees them; bfloat16 as its bits."""
    return np.asarray(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w)


def _floats(w: npt.NDArray[Any]) -> Floats:
    """A copy, row by row."""
    if w.dtype == np.uint16:
        return np.left_shift(np.ascontiguousarray(w), np.uint32(16), dtype=np.uint32).view(np.float32)
    return w.astype(np.float32, order="C")


def _fit(
    w: npt.NDArray[Any], bits: int, dtype: mx.Dtype, effort: Effort
) -> tuple[npt.NDArray[np.uint32], Floats, Floats]:
    """Words [G, n * bits / 32], scales and biases [G] of groups [G, n]."""
    with np.errstate(all="ignore"):  # values that are not finite are refused elsewhere
        search = _Search(_floats(w.T), bits, dtype)
        search.start()
        for i in range(effort.ends):
            for j in range(effort.ends):
                search.improve(*search.drawn_in(i * effort.tenths, j * effort.tenths))
        for _ in range(effort.rounds):
            search.improve(search.s, search.b)
        return search.words().T, search.s * search.down, search.b * search.down + search.zero


class _Search:
    """Groups [n, G] on their way: ``X`` in integers, ``x`` the same in float, the best ``s`` and ``b`` [G] so far in units of X."""

    def __init__(self, w: Floats, bits: int, dtype: mx.Dtype) -> None:
        self.bits, self.top, self.dtype, self.n = bits, (1 << bits) - 1, dtype, len(w)
        self.first, self.last = w.min(axis=0), w.max(axis=0)
        self.zero = np.clip(np.float32(0), self.first, self.last)
        largest = np.maximum(self.last - self.zero, self.zero - self.first)
        shift = np.minimum(15 - ((largest.view(np.int32) >> 23) - 126), MOST_SHIFT)
        self.up, self.down = (((sign * shift + 127) << 23).view(np.float32) for sign in (1, -1))
        np.multiply(np.subtract(w, self.zero, out=w), self.up, out=w)
        np.clip(np.rint(w, out=w), -MOST, MOST, out=w)
        self.x, self.X = w, w.astype(np.int32)
        self.sum = np.add.reduce(self.X, axis=0, dtype=np.int32)
        self.q, self.scratch = np.empty_like(self.X), np.empty_like(self.X)
        self.low, self.high = self.X.min(axis=0), self.X.max(axis=0)

    def start(self) -> None:
        """Begin with what `mx.quantize` would take."""
        low, high = self._rounded(self.first), self._rounded(self.last)
        is_low = np.abs(low) > np.abs(high)
        edge, s = np.where(is_low, low, high), np.maximum((high - low) / np.float32(self.top), LEAST_STEP)
        s = np.where(is_low, s, -s)
        steps = np.rint(edge / s)
        self.s = self._rounded(np.where(steps == 0, s, edge / steps)) * self.up
        self.b = (np.where(steps == 0, np.float32(0), edge) - self.zero) * self.up
        self.least = np.full(len(self.s), np.iinfo(np.int64).max)
        sums = self._sums(self.s, self.b)
        self._keep(self.s, self.b, sums)
        self._keep(*self._least_squares(self.s, sums), sums)

    def drawn_in(self, low: int, high: int) -> tuple[Floats, Floats]:
        """The scale and bias of a range whose ends are drawn in by so many tenths of a step."""
        across, whole = np.maximum(self.high - self.low, 1), 10 * self.top
        s = (across * (whole - low - high)).astype(np.float32) / np.float32(whole * self.top)
        return s, self.low.astype(np.float32) + (across * low).astype(np.float32) / np.float32(whole)

    def improve(self, s: Floats, b: Floats) -> None:
        """Take the codes of (s, b), and keep their least squares if that is the best so far."""
        sums = self._sums(s, b)
        self._keep(*self._least_squares(s, sums), sums)

    def words(self) -> npt.NDArray[np.uint32]:
        """Codes of the best as MLX packs them [n * bits / 32, G]: one stream of bits, lowest first."""
        self._codes(self.s, self.b)
        q, words = self.q.view(np.uint32), np.zeros((self.n * self.bits // 32, self.q.shape[1]), np.uint32)
        for i in range(self.n):
            word, shift = divmod(i * self.bits, 32)
            words[word] |= q[i] << np.uint32(shift)
            if shift + self.bits > 32:
                words[word + 1] |= q[i] >> np.uint32(32 - shift)
        return words

    def _rounded(self, v: Floats) -> Floats:
        """As scales and biases are stored."""
        if self.dtype == mx.bfloat16:
            units = v.view(np.uint32)
            return ((units + 0x7FFF + ((units >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return v.astype(np.float16).astype(np.float32) if self.dtype == mx.float16 else v

    def _codes(self, s: Floats, b: Floats) -> None:
        """Into ``q``; all 0 where s or b cannot be used."""
        is_used, exact = self._fits(s, b) & (s != 0), self.scratch.view(np.float32)
        np.subtract(self.x, np.where(is_used, b, 0), out=exact)
        np.multiply(exact, np.where(is_used, 1 / s, 0), out=exact)
        np.clip(np.rint(exact, out=exact), 0, self.top, out=exact)
        np.copyto(self.q, exact, casting="unsafe")

    def _sums(self, s: Floats, b: Floats) -> tuple[Ints, Ints, Ints]:
        """Of the codes of (s, b), of their squares, and of their products with X [G]."""
        self._codes(s, b)
        q, scratch = self.q, self.scratch
        squares = np.add.reduce(np.multiply(q, q, out=scratch), axis=0, dtype=np.int32)
        products = np.add.reduce(np.multiply(q, self.X, out=scratch), axis=0, dtype=np.int32)
        return np.add.reduce(q, axis=0, dtype=np.int32), squares, products

    def _least_squares(self, s: Floats, sums: tuple[Ints, Ints, Ints]) -> tuple[Floats, Floats]:
        """The stored scale and bias that suit the codes best; the old scale where the codes do not vary."""
        q, qq, qx = sums
        variance = self.n * qq - q * q
        covariance = self.n * qx.astype(np.int64) - self.sum.astype(np.int64) * q
        found = covariance.astype(np.float32) / variance.astype(np.float32)
        s = self._rounded(np.where((variance > 0) & (covariance != 0), found, s) * self.down) * self.up
        b = (self.sum.astype(np.float32) - np.rint(s * q.astype(np.float32))) / np.float32(self.n)
        return s, (self._rounded(b * self.down + self.zero) - self.zero) * self.up

    def _keep(self, s: Floats, b: Floats, sums: tuple[Ints, Ints, Ints]) -> None:
        """Take (s, b) where the codes' squared error, but for the sum of X squared, is the least so far."""
        q, qq, qx = (a.astype(np.int64) for a in sums)
        one = 1 << FRACTION_BITS
        S, B = (np.rint(v * np.float32(one)).astype(np.int64) for v in (s, b))
        error = S * (S * qq + 2 * (B * q - one * qx)) + B * (self.n * B - 2 * one * self.sum.astype(np.int64))
        is_better = self._fits(s, b) & (error < self.least)
        self.s, self.b = np.where(is_better, s, self.s), np.where(is_better, b, self.b)
        self.least = np.where(is_better, error, self.least)

    def _fits(self, s: Floats, b: Floats) -> npt.NDArray[np.bool_]:
        return (np.abs(s) * np.float32(self.top) <= FARTHEST) & (np.abs(b) <= FARTHEST)
