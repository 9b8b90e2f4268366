"""Quantization that makes up for the error of each column in those that follow, from second-order knowledge of the inputs.

Of inputs x of a matrix, ``H = sum x x^T``; an error E of the weights changes the outputs by ``tr(E H E^T)`` in all.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ring_mlx.convert.fit import quantize
from ring_mlx.convert.grids import pack
from ring_mlx.convert.recipes import Setting

Array = npt.NDArray[np.float64]
# What is added to H's diagonal, of its mean: so much of the inputs is taken to be noise. Where H has no Cholesky factor then, by tens more.
DAMPING, MOST_DAMPING = 0.01, 1.0
# How often scales, biases and codes are improved in turn, once all columns have been gone through.
ROUNDS = 2


class Inputs(NamedTuple):
    """What is known of the inputs of matrices, with columns in ``order`` [E, K], whole groups of ``group``.

    ``hessian`` H [E, K, K] is damped, ``upper`` is U [E, K, K] of ``H^-1 = U^T U``; all float32.
    """

    hessian: mx.array
    upper: mx.array
    order: mx.array
    group: int


class Grid(NamedTuple):
    """Matrices on their grid: codes [E, K, R], scales and biases [E, K / group, R], all float32."""

    codes: mx.array
    scales: mx.array
    biases: mx.array

    def weights(self) -> mx.array:
        """[E, K, R]."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return self.codes * mx.repeat(self.scales, group, axis=1) + mx.repeat(self.biases, group, axis=1)

    def packed(self, inputs: Inputs, bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
        """As `fit.quantize` gives it, for all rows [E R, K] one below the other, columns where they were."""
        groups = mx.argsort(inputs.order[:, :: inputs.group] // inputs.group, axis=1)
        places = mx.argsort(inputs.order, axis=1), groups, groups
        back = [mx.take_along_axis(a, at[..., None], axis=1) for a, at in zip(self, places, strict=True)]
        rows = [a.swapaxes(1, 2).reshape(-1, a.shape[1]) for a in back]
        return {"weight": pack(rows[0], bits), "scales": rows[1].astype(dtype), "biases": rows[2].astype(dtype)}


def prepare(hessian: mx.array, group: int) -> Inputs | None:
    """The inputs whose H [E, K, K] this is; None if it is that of none, since it is not finite or not positive.

    The group of columns with the largest inputs comes first, and in each group the column with the largest.
    """
    plain = np.array(hessian.astype(mx.float32)).astype(np.float64)
    if not np.isfinite(plain).all():
        return None
    E, K, _ = plain.shape
    power = np.einsum("ekk->ek", plain)
    by_group = power.reshape(E, -1, group)
    groups = np.argsort(-by_group.sum(axis=2), axis=1, kind="stable")
    inside = np.argsort(-by_group, axis=2, kind="stable")
    order = (groups[..., None] * group + np.take_along_axis(inside, groups[..., None], axis=1)).reshape(E, K)
    plain = plain[np.arange(E)[:, None, None], order[:, :, None], order[:, None, :]]
    mean = power.mean(axis=1)
    mean[mean <= 0] = 1.0
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = plain + (damping * mean)[:, None, None] * np.eye(K)
        try:
            # The factor of H turned round is V with H = V V^T and V upper, whose inverse is U.
            v = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        upper = np.triu(np.linalg.inv(v))
        h, u, places = (
            mx.array(a) for a in (damped.astype(np.float32), upper.astype(np.float32), order.astype(np.int32))
        )
        return Inputs(h, u, places, group)
    return None


def solve(
    w: mx.array, inputs: Inputs, setting: Setting, dtype: mx.Dtype, fit: str = "fast", rounds: int = ROUNDS
) -> dict[str, mx.array]:
    """Quantize matrices w [E, R, K] for their inputs.

    ::

        for each column j in order:
            q_j = clip(round((w_j - b) / s), 0, 2^bits - 1)
            e_j = (w_j - s q_j - b) / U_jj;  w_k -= e_j U_jk for every later k

    A group's s and b are the fit of what its columns are when it is reached. Then, in ``rounds``, the s and b of each group
    become the least squares of tr(E H E^T) for its codes, and each code the best for all others: no round makes it worse, but for
    the rounding of float32.

    Args:
        w: [E, R, K] float.
        inputs: Of each matrix, in groups of the setting, or of all of them if it is of one.
        setting: Affine.
        dtype: Of scales and biases.
        fit: As of `fit.quantize`.

    Returns:
        As `fit.quantize`, of rows [E R, K].

    Source: GPTQ (Frantar et al. 2023, arXiv 2210.17323); the rounds are coordinate descent, as in QuantEase (Behdin et al. 2023,
    arXiv 2309.01885).
    """
    columns = mx.take_along_axis(w.astype(mx.float32).swapaxes(1, 2), inputs.order[..., None], axis=1)
    grid = _sweep(columns, inputs, setting, dtype, fit)
    for _ in range(rounds):
        grid = _improve(columns, grid, inputs.hessian, setting.bits, dtype)
    return grid.packed(inputs, setting.bits, dtype)


def _sweep(w: mx.array, inputs: Inputs, setting: Setting, dtype: mx.Dtype, fit: str) -> Grid:
    """GPTQ of w [E, K, R], whose columns are in order."""
    n, top, K = setting.group_size, float((1 << setting.bits) - 1), w.shape[1]
    codes, scales, biases = [], [], []
    for at in range(0, K, n):
        # What is left of w begins at this group.
        block, upper = w[:, :n], inputs.upper[:, at : at + n, at:]
        s, b = _fitted(block, setting, dtype, fit)
        found, errors = [], []
        for j in range(n):
            row = upper[:, j, :n, None]
            q = mx.clip(mx.round((block[:, j] - b) / s), 0, top)
            error = (block[:, j] - s * q - b) / row[:, j]
            block = block - row * error[:, None]
            found.append(q)
            errors.append(error)
        codes.append(mx.stack(found, axis=1))
        scales.append(s)
        biases.append(b)
        w = w[:, n:] - upper[:, :, n:].swapaxes(1, 2) @ mx.stack(errors, axis=1) if at + n < K else w[:, n:]
        mx.eval(w, codes[-1])
    return Grid(mx.concatenate(codes, axis=1), mx.stack(scales, axis=1), mx.stack(biases, axis=1))


def _fitted(block: mx.array, setting: Setting, dtype: mx.Dtype, fit: str) -> tuple[mx.array, mx.array]:
    """Scales and biases [E, R] of a group's columns [E, n, R]; a scale is never 0."""
    E, n, R = block.shape
    packed = quantize(block.swapaxes(1, 2).reshape(E * R, n), setting, dtype, fit)
    s, b = (packed[part].astype(mx.float32).reshape(E, R) for part in ("scales", "biases"))
    return mx.where(s == 0, 1.0, s), b


def _improve(w: mx.array, grid: Grid, h: mx.array, bits: int, dtype: mx.Dtype) -> Grid:
    """A round over the groups of w [E, K, R]: least squares of s and b, then every code for all others."""
    groups, top = grid.scales.shape[1], float((1 << bits) - 1)
    n = w.shape[1] // groups
    codes, scales, biases = [], [], []
    slope = h @ (grid.weights() - w)  # half the gradient of tr(E H E^T)
    for g in range(groups):
        at = slice(g * n, g * n + n)
        q, s, b, own = grid.codes[:, at], grid.scales[:, g], grid.biases[:, g], h[:, at, at]
        before = s[:, None] * q + b[:, None]
        s, b = _least_squares(q, s, b, own, slope[:, at], dtype)
        d = s[:, None] * q + b[:, None]
        pull, found = slope[:, at] + own @ (d - before), []
        for j in range(n):
            wanted = d[:, j] - pull[:, j] / own[:, j, j, None]
            code = mx.clip(mx.round((wanted - b) / s), 0, top)
            pull = pull + own[:, :, j, None] * (s * code + b - d[:, j])[:, None]
            found.append(code)
        codes.append(mx.stack(found, axis=1))
        slope = slope + h[:, :, at] @ (s[:, None] * codes[-1] + b[:, None] - before)
        scales.append(s)
        biases.append(b)
        mx.eval(slope, codes[-1])
    return Grid(mx.concatenate(codes, axis=1), mx.stack(scales, axis=1), mx.stack(biases, axis=1))


def _least_squares(
    q: mx.array, s: mx.array, b: mx.array, own: mx.array, slope: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The stored s and b [E, R] of least error for codes q [E, n, R], or the old ones where they are no worse.

    ``own`` [E, n, n] is H within the group, ``slope`` [E, n, R] half the gradient there.
    """
    hq, h1 = own @ q, own.sum(axis=2)[..., None]
    qq, q1, one = (q * hq).sum(axis=1), (q * h1).sum(axis=1), h1.sum(axis=1)
    down, across = (q * slope).sum(axis=1), slope.sum(axis=1)
    determinant = qq * one - q1 * q1
    is_safe = determinant > 1e-6 * qq * one
    ds = mx.where(is_safe, (q1 * across - one * down) / mx.where(is_safe, determinant, 1.0), 0.0)
    new_s = (s + ds).astype(dtype).astype(mx.float32)
    ds = new_s - s
    # The bias comes after the scale is rounded, and for it.
    new_b = (b - (across + ds * q1) / one).astype(dtype).astype(mx.float32)
    db = new_b - b
    change = 2 * (ds * down + db * across) + ds * ds * qq + 2 * ds * db * q1 + db * db * one
    is_better = (change < 0) & (new_s != 0) & is_safe
    return mx.where(is_better, new_s, s), mx.where(is_better, new_b, b)


def naive_solve(w: Array, h: Array, setting: Setting, dtype: mx.Dtype, fit: str = "fast") -> tuple[Array, float]:
    """The definition of `solve` with no rounds, of one matrix w [R, K] with H [K, K]: the weights that are stored, and tr(E H E^T).

    Optimal brain quantization column by column: after each, its row and column are eliminated from the inverse of H.
    """
    w, top, n = w.copy(), (1 << setting.bits) - 1, setting.group_size
    power = np.diag(h)
    damped = h + DAMPING * power.mean() * np.eye(len(h))
    inverse, stored, whole = np.linalg.inv(damped), np.empty_like(w), w.copy()
    for group in np.argsort(-power.reshape(-1, n).sum(axis=1), kind="stable"):
        at = group * n + np.argsort(-power[group * n : (group + 1) * n], kind="stable")
        s, b = (
            np.array(a)[0].astype(np.float64)
            for a in _fitted(mx.array(w[:, at].T[None], mx.float32), setting, dtype, fit)
        )
        for j in at:
            stored[:, j] = s * np.clip(np.rint((w[:, j] - b) / s), 0, top) + b
            w -= np.outer((w[:, j] - stored[:, j]) / inverse[j, j], inverse[j])
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    error = stored - whole
    return stored, float(((error @ damped) * error).sum())
