"""The weights of one layer's experts as the kernels take them, and their plain form in MLX's gathered products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx

from metal_kernels.packed import MIN_SIZE, Packed, Weights, starts
from metal_kernels.router.naive import naive_route

Shared = tuple[Packed, Packed, Packed]  # gate, up and down

# Matrices that the plain form unpacks at once; MLX's CUDA backend compiles for a minute before its first gathered product.
FEW = 80


@dataclass(frozen=True, eq=False)
class Experts(Weights):
    """Gate, up and down of a layer's experts, and its shared expert; build it once a layer.

    Args:
        gate: Stack [E, I, D].
        up: Stack [E, I, D].
        down: Stack [E, D, I].
        shared: Gate, up and down of the shared expert, [S, D], [S, D] and [D, S]; None is none.
        buffer: A `bundle` of all these arrays, in order, of which they are parts; None if they are not.
    """

    gate: Packed
    up: Packed
    down: Packed
    shared: Shared | None = None
    buffer: mx.array | None = None

    def __post_init__(self) -> None:
        shapes = [w.shape for w in self.routed]
        E, inner, hidden = shapes[0]
        if shapes[1:] != [(E, inner, hidden), (E, hidden, inner)]:
            raise ValueError(f"[moe] gate, up and down disagree: {shapes}.")

    @property
    def routed(self) -> Shared:
        """Gate, up and down of the stacks."""
        return self.gate, self.up, self.down

    @property
    def supported(self) -> bool:
        """Whether the kernels read these formats at all."""
        return all(w.is_readable for w in self.routed) and self.gate.format == self.up.format

    @cached_property
    def rides(self) -> bool:
        """Whether the shared expert goes through the kernels as one more: its format and sizes are those of the others."""
        return self.shared is not None and all(
            s.format == w.format
            and s.weight.shape == w.weight.shape[1:]
            and s.weight.size >= MIN_SIZE
            and (s.scales is None or s.scales.size >= MIN_SIZE)
            for s, w in zip(self.shared, self.routed, strict=True)
        )

    @cached_property
    def stacks(self) -> Experts:
        """Without the shared expert."""
        return Experts(*self.routed, None, self.buffer)

    def arrays(self, *numbers: int) -> list[mx.array]:
        """Of gate, up and down by number: of the stacks, then of the shared expert; the stacks' again where it does not ride."""
        alone = self.shared if self.rides and self.shared else self.routed
        return [x for of in (self.routed, alone) for n in numbers for x in of[n].arrays]

    def bound(self, *numbers: int) -> tuple[list[mx.array], list[int]]:
        """What stands for these arrays: they themselves or the buffer; and where in that each starts, in words."""
        arrays = self.arrays(*numbers)
        if self.buffer is None:
            return arrays, [0] * len(arrays)
        *parts, buffer = self.leaves
        found = dict(zip(map(id, parts), starts(parts), strict=True))
        return [buffer] * len(arrays), [found[id(x)] for x in arrays]

    def check(self, x: mx.array, chosen: mx.array, weights: mx.array, residual: mx.array | None) -> None:
        """Raises ValueError unless tokens, choice and residual fit each other and these weights."""
        shape, pairs, hidden = x.shape, chosen.shape, self.gate.shape[-1]
        if len(shape) < 2 or shape[-1] != hidden or (residual is not None and residual.shape != shape):
            got = [a.shape for a in (x, residual) if a is not None]
            raise ValueError(f"[moe] x and residual must be [..., {hidden}] but got {got}.")
        if pairs[:-1] != shape[:-1] or weights.shape != pairs:
            raise ValueError(
                f"[moe] chosen and weights must be {[*shape[:-1]]} + [k] but got {pairs}, {weights.shape}."
            )
        if chosen.dtype != mx.int32 or weights.dtype != mx.float32:
            raise ValueError(f"[moe] chosen must be int32, weights float32 but got {chosen.dtype}, {weights.dtype}.")

    def slots(self, top_k: int) -> int:
        """Experts that each token goes through in the kernels."""
        return top_k + self.rides


def plain_moe(
    x: mx.array, chosen: mx.array, weights: mx.array, experts: Experts, residual: mx.array | None = None
) -> mx.array:
    """Send every token through its chosen experts and the shared one, and add them up.

    ::

        expert_e(x) = down_e (silu(gate_e x) * (up_e x))
        y_t = residual_t + sum_j w_tj expert_{chosen_tj}(x_t) + shared(x_t)

    All products are of float32, MLX's gathered ones where many experts are chosen, and the sum is float32.

    Args:
        x: Tokens [..., D], any float dtype.
        chosen: Experts of each token [..., k], int32, no expert twice.
        weights: Their weights [..., k], float32.
        residual: [..., D], any float dtype; None is zero.

    Returns:
        y [..., D] in the dtype of ``residual``, rounded once; float32 without one.

    Source: arXiv 2510.19338, section 2; the SwiGLU experts of DeepSeekMoE, arXiv 2401.06066.
    """
    wide = x.astype(mx.float32)
    rows = wide[..., None, None, :]
    parts = _swiglu(_gathered(rows, experts.gate, chosen), _gathered(rows, experts.up, chosen))
    y = (_gathered(parts, experts.down, chosen)[..., 0, :] * weights[..., None]).sum(axis=-2)
    if experts.shared is not None:
        gate, up, down = (w.dequantize().T for w in experts.shared)
        y = y + _swiglu(wide @ gate, wide @ up) @ down
    return y if residual is None else (y + residual.astype(mx.float32)).astype(residual.dtype)


def naive_routed_moe(
    x: mx.array,
    logits: mx.array,
    bias: mx.array | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    factor: float,
    normalize: bool,
    experts: Experts,
    residual: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """`naive_route`, then `plain_moe`: y, and the choice and its weights."""
    chosen, weights = naive_route(logits, bias, top_k, n_group, topk_group, factor, normalize)
    return plain_moe(x, chosen, weights, experts, residual), chosen, weights


def _gathered(x: mx.array, w: Packed, chosen: mx.array) -> mx.array:
    """x [..., k or 1, 1, K] through matrix ``chosen[..., k]`` of a stack, in float32; unpacks few of its matrices, or none."""
    if chosen.size <= FEW:
        scales, biases = (None if a is None else a[chosen] for a in (w.scales, w.biases))
        few = replace(w, weight=w.weight[chosen], scales=scales, biases=biases)
        return x @ few.dequantize().swapaxes(-1, -2)
    if w.scales is None:
        return mx.gather_mm(x, w.weight.astype(mx.float32).swapaxes(-1, -2), rhs_indices=chosen)
    return mx.gather_qmm(x, w.weight, rhs_indices=chosen, transpose=True, **w.layout)


def shared_product(x: mx.array, mlp: Shared) -> mx.array:
    """``down (silu(gate x) * (up x))`` in float32 MLX operations, without dequantizing whole matrices: [..., D]."""
    x = x.astype(mx.float32)
    return _product(_swiglu(_product(x, mlp[0]), _product(x, mlp[1])), mlp[2])


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _product(x: mx.array, w: Packed) -> mx.array:
    if w.scales is None:
        return x @ w.dequantize().T
    return mx.quantized_matmul(x, w.weight, transpose=True, **w.layout)
