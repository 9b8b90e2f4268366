"""Inputs of the tests of the mixture-of-experts kernels, and their float64 answer; knows no kernel."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from metal_kernels.packed import Packed
from tests.compare import to_numpy

AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MICRO = [("mxfp4", 4, 32), ("mxfp8", 8, 32)]
PLAIN = [("plain", 16, 0), ("plain", 32, 0)]
# Four bits in every group, the other widths in one: the rest is slow.
QUICK = {*AFFINE[6:9], ("affine", 2, 32), ("affine", 3, 64), ("affine", 5, 128), ("affine", 6, 32), ("affine", 8, 64)}
EVERY_FORMAT = [
    pytest.param(form, marks=[pytest.mark.slow] * (form in AFFINE and form not in QUICK))
    for form in (*AFFINE, *MICRO, *PLAIN)
]
Format = tuple[str, int, int]
Shared = tuple[Packed, Packed, Packed]


def packed(shape: tuple[int, ...], form: Format, seed: int, dtype: mx.Dtype = mx.bfloat16) -> Packed:
    """Random weights [..., N, K] of about 1 / sqrt(K), with an offset so that affine biases matter."""
    mode, bits, group = form
    w = (mx.random.normal(shape, key=mx.random.key(seed)) + 0.3) / shape[-1] ** 0.5
    if mode == "plain":
        return Packed(w.astype(mx.float32 if bits == 32 else dtype))
    parts = mx.quantize(w.astype(dtype), group_size=group, bits=bits, mode=mode)
    return Packed(parts[0], parts[1], parts[2] if len(parts) > 2 else None, bits, group, mode)


class Case:
    """One layer's experts and some tokens; every axis has another size unless a test asks otherwise."""

    def __init__(
        self,
        form: Format,
        tokens: int,
        *,
        experts: int = 5,
        top_k: int = 3,
        hidden: int = 96,
        inner: int = 64,
        shared: int | None = None,
        down_form: Format | None = None,
        dtype: mx.Dtype = mx.bfloat16,
        residual: mx.Dtype | None = None,
        seed: int = 0,
    ) -> None:
        stacked = [(experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)]
        forms = (form, form, down_form or form)
        self.routed = [packed(s, f, seed + i, dtype) for i, (s, f) in enumerate(zip(stacked, forms, strict=True))]
        self.shared = None
        if shared is not None:
            alone = [(shared, hidden), (shared, hidden), (hidden, shared)]
            g, u, d = (packed(s, f, seed + 3 + i, dtype) for i, (s, f) in enumerate(zip(alone, forms, strict=True)))
            self.shared = (g, u, d)
        keys = [mx.random.key(seed + 10 + i) for i in range(4)]
        self.x = mx.random.normal((tokens, hidden), key=keys[0]).astype(dtype)
        scores = mx.random.uniform(shape=(tokens, experts), key=keys[1])
        self.chosen = mx.argsort(scores, axis=-1)[:, :top_k].astype(mx.int32)
        self.weights = mx.random.uniform(0.1, 1.0, (tokens, top_k), key=keys[2])
        self.residual = None
        if residual is not None:
            self.residual = mx.random.normal((tokens, hidden), key=keys[3]).astype(residual)
        mx.eval(self.x, self.chosen, self.weights)

    @property
    def dtype(self) -> mx.Dtype:
        """Of the result."""
        return mx.float32 if self.residual is None else self.residual.dtype

    def exact(self) -> npt.NDArray[np.float64]:
        """y [T, D] in float64."""
        x, weights, chosen = to_numpy(self.x), to_numpy(self.weights), np.array(self.chosen)
        gate, up, down = (to_numpy(w.dequantize()) for w in self.routed)
        y = np.zeros(x.shape) if self.residual is None else to_numpy(self.residual)
        for t in range(len(x)):
            for j, e in enumerate(chosen[t]):
                y[t] += weights[t, j] * _mlp(x[t], gate[e], up[e], down[e])
        if self.shared is not None:
            y += _mlp(x, *(to_numpy(w.dequantize()) for w in self.shared))
        return y


def _mlp(
    x: npt.NDArray[np.float64],
    gate: npt.NDArray[np.float64],
    up: npt.NDArray[np.float64],
    down: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    g = x @ gate.T
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def naive_moe(
    x: mx.array,
    chosen: mx.array,
    weights: mx.array,
    gate: Packed,
    up: Packed,
    down: Packed,
    shared: Shared | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """As `metal_kernels.quantized_moe.plain_moe`, in float32 products of the dequantized weights, all of them unpacked."""
    x = x.astype(mx.float32)
    g = _expert_products(x[..., None, :], gate, chosen)
    u = _expert_products(x[..., None, :], up, chosen)
    y = (_expert_products(_swiglu(g, u), down, chosen) * weights.astype(mx.float32)[..., None]).sum(axis=-2)
    if shared is not None:
        y = y + naive_mlp(x, shared)
    return y if residual is None else (y + residual.astype(mx.float32)).astype(residual.dtype)


def naive_mlp(x: mx.array, mlp: Shared) -> mx.array:
    """``down (silu(gate x) * (up x))`` for x [..., D], float32 throughout."""
    gate, up, down = (w.dequantize().T for w in mlp)
    x = x.astype(mx.float32)
    return _swiglu(x @ gate, x @ up) @ down


def _expert_products(x: mx.array, stack: Packed, chosen: mx.array) -> mx.array:
    """x [..., k or 1, K] through matrix ``chosen[..., j]`` of the stack [E, N, K], to [..., k, N] float32."""
    return mx.gather_mm(x[..., None, :], stack.dequantize().swapaxes(-1, -2), rhs_indices=chosen)[..., 0, :]


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up
