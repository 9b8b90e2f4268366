"""The mixture of experts in float32 MLX operations: the definition that the kernels are held to."""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.packed import Packed

Shared = tuple[Packed, Packed, Packed]


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
    """Send every token through its chosen experts and the shared one, and add them up.

    ::

        expert_e(x) = down_e (silu(gate_e x) * (up_e x))
        y_t = residual_t + sum_j w_tj expert_{chosen_tj}(x_t) + shared(x_t)

    All products are float32 products of the dequantized weights, and the sum is float32.

    Args:
        x: Tokens [..., D], any float dtype.
        chosen: Experts of each token [..., k], int32, no expert twice.
        weights: Their weights [..., k], float32.
        gate: Stack [E, I, D].
        up: Stack [E, I, D].
        down: Stack [E, D, I].
        shared: Gate [S, D], up [S, D] and down [D, S] of the shared expert, unscaled; None is none.
        residual: [..., D], any float dtype; None is zero.

    Returns:
        y [..., D] in the dtype of ``residual``, rounded once; float32 without one.

    Source: arXiv 2510.19338, section 2; the SwiGLU experts of DeepSeekMoE, arXiv 2401.06066.
    """
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
