"""The weights of one layer's experts as the kernels take them: formats checked and arguments prepared once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metal_kernels.packed import Packed
from metal_kernels.quantized_moe.naive import Shared, naive_mlp

Template = list[tuple[str, "int | bool | mx.Dtype"]]

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Codes of the kernels' MODE, and the bits of each that they read.
MODES = {"plain": 0, "affine": 1, "mxfp4": 2, "mxfp8": 2}
BITS = {"plain": (16, 32), "affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,)}
# Rows, groups and 16-byte loads all fall on blocks of 32 values.
BLOCK = 32
# Matrices that the plain form unpacks at once; MLX's CUDA backend compiles for a minute before its first gathered product.
FEW = 80
# MLX hands shorter arrays to kernels in another address space.
MIN_SIZE = 8
# What a threadgroup may have on every Apple GPU (Metal's feature set tables).
THREADGROUP_BYTES = 32 * 1024


def stored_bits(w: Packed) -> int:
    """Bits of a value in memory; a plain array knows its own."""
    return 8 * w.weight.dtype.size if w.mode == "plain" else w.bits


def inner_size(w: Packed) -> int:
    """K of weights [..., N, K]."""
    width = int(w.weight.shape[-1])
    return width if w.mode == "plain" else width * 32 // w.bits


def logical_shape(w: Packed) -> tuple[int, ...]:
    """[..., N, K] of weights that may be packed."""
    return (*w.weight.shape[:-1], inner_size(w))


def format_of(w: Packed) -> tuple[str, int, int, mx.Dtype, mx.Dtype | None]:
    """Equal for two matrices exactly if one compiled kernel reads both."""
    return w.mode, stored_bits(w), w.group_size, w.weight.dtype, None if w.scales is None else w.scales.dtype


def is_readable(w: Packed) -> bool:
    """Whether the kernels know the format: MLX's affine, mxfp4 and mxfp8, or plain floats in blocks of 32."""
    if w.mode not in MODES or stored_bits(w) not in BITS[w.mode] or inner_size(w) % BLOCK:
        return False
    if w.mode == "plain":
        return w.weight.dtype in FLOATS and w.weight.size >= MIN_SIZE
    return (
        w.group_size % BLOCK == 0
        and w.scales is not None
        and w.scales.size >= MIN_SIZE
        and (w.scales.dtype in FLOATS if w.mode == "affine" else w.scales.dtype == mx.uint8)
        and (w.biases is not None) == (w.mode == "affine")
    )


def arrays(w: Packed) -> list[mx.array]:
    """Weight, scales and biases; what a format lacks is filled with what it has, and never read."""
    scales = w.weight if w.scales is None else w.scales
    return [w.weight, scales, scales if w.biases is None else w.biases]


def format_template(w: Packed) -> list[tuple[str, int]]:
    """The kernels' arguments MODE, BITS, GROUP, N, K."""
    n, group = int(w.weight.shape[-2]), w.group_size if w.mode != "plain" else BLOCK
    return [("MODE", MODES[w.mode]), ("BITS", stored_bits(w)), ("GROUP", group), ("N", n), ("K", inner_size(w))]


def factor_bytes(w: Packed, rows: int) -> tuple[int, int]:
    """What scales and biases of so many rows take in threadgroup memory; an array that is not used has four bytes."""
    per_row = inner_size(w) // max(w.group_size, BLOCK)
    scales = 4 if w.scales is None else rows * per_row * w.scales.dtype.size
    return scales, 4 if w.biases is None else scales


def padded(*sizes: int) -> int:
    """Bytes of threadgroup memory that arrays of these sizes take, in whatever order they lie."""
    return sum(-(-n // 16) * 16 for n in sizes)


@dataclass
class Experts:
    """Gate, up and down of a layer's experts, and its shared expert; build it once a layer.

    Args:
        gate: Stack [E, I, D].
        up: Stack [E, I, D].
        down: Stack [E, D, I].
        shared: Gate, up and down of the shared expert, [S, D], [S, D] and [D, S]; None is none.

    Attributes:
        count: E.
        hidden: D.
        rides: The shared expert goes through the kernels as one more expert: its format and sizes are those of the
            others. Otherwise the wrappers add it with plain operations.
        supported: Whether the kernels read these formats at all.
        prepared: What the wrappers work out once, kept from call to call.
    """

    gate: Packed
    up: Packed
    down: Packed
    shared: Shared | None = None
    count: int = field(init=False)
    hidden: int = field(init=False)
    rides: bool = field(init=False)
    supported: bool = field(init=False)
    prepared: dict[object, Any] = field(init=False, default_factory=dict, repr=False)
    gate_up_arrays: list[mx.array] = field(init=False, repr=False)
    down_arrays: list[mx.array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        routed = (self.gate, self.up, self.down)
        (self.count, inner, self.hidden), *others = (logical_shape(w) for w in routed)
        if others != [(self.count, inner, self.hidden), (self.count, self.hidden, inner)]:
            raise ValueError(f"[moe] gate, up and down disagree: {[logical_shape(w) for w in routed]}.")
        self.supported = all(map(is_readable, routed)) and format_of(self.gate) == format_of(self.up)
        self.rides = self.shared is not None and all(
            format_of(s) == format_of(w)
            and s.weight.shape == w.weight.shape[1:]
            and s.weight.size >= MIN_SIZE
            and (s.scales is None or s.scales.size >= MIN_SIZE)
            for s, w in zip(self.shared, routed, strict=True)
        )
        gate, up, down = self.shared if self.rides and self.shared is not None else routed
        self.gate_up_arrays = [*arrays(self.gate), *arrays(self.up), *arrays(gate), *arrays(up)]
        self.down_arrays = [*arrays(self.down), *arrays(down)]

    def check(self, x: mx.array, chosen: mx.array, weights: mx.array, residual: mx.array | None) -> None:
        """Raises ValueError unless tokens, choice and residual fit each other and these weights."""
        shape, pairs = x.shape, chosen.shape
        if len(shape) < 2 or shape[-1] != self.hidden or (residual is not None and residual.shape != shape):
            got = [a.shape for a in (x, residual) if a is not None]
            raise ValueError(f"[moe] x and residual must be [..., {self.hidden}] but got {got}.")
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
    """Same contract as `naive_moe` in MLX's gathered products, which leave the stacks as they are packed."""
    rows = x.astype(mx.float32)[..., None, None, :]
    gate, up = _gathered(rows, experts.gate, chosen), _gathered(rows, experts.up, chosen)
    parts = _gathered(gate * mx.sigmoid(gate) * up, experts.down, chosen)[..., 0, :]
    y = (parts * weights[..., None]).sum(axis=-2)
    if experts.shared is not None:
        y = y + naive_mlp(x, experts.shared)
    return y if residual is None else (y + residual.astype(mx.float32)).astype(residual.dtype)


def _gathered(x: mx.array, w: Packed, chosen: mx.array) -> mx.array:
    """x [..., k or 1, 1, K] through matrix ``chosen[..., k]`` of a stack, in float32; unpacks few of its matrices, or none."""
    if chosen.size <= FEW:
        scales, biases = (None if a is None else a[chosen] for a in (w.scales, w.biases))
        few = w._replace(weight=w.weight[chosen], scales=scales, biases=biases)
        return x @ few.dequantize().swapaxes(-1, -2)
    if w.scales is None:
        return mx.gather_mm(x, w.weight.astype(mx.float32).swapaxes(-1, -2), rhs_indices=chosen)
    return mx.gather_qmm(x, w.weight, rhs_indices=chosen, transpose=True, **_layout(w))


def shared_product(x: mx.array, mlp: Shared) -> mx.array:
    """``down (silu(gate x) * (up x))`` in float32 MLX operations, without dequantising whole matrices: [..., D]."""
    x = x.astype(mx.float32)
    gate, up = _product(x, mlp[0]), _product(x, mlp[1])
    return _product(gate * mx.sigmoid(gate) * up, mlp[2])


def _product(x: mx.array, w: Packed) -> mx.array:
    if w.scales is None:
        return x @ w.dequantize().T
    return mx.quantized_matmul(x, w.weight, transpose=True, **_layout(w))


def _layout(w: Packed) -> dict[str, Any]:
    """How a float32 product reads quantised weights."""
    scales, biases = w.scales, w.biases
    if scales is not None and biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return {"scales": scales, "biases": biases, "group_size": w.group_size, "bits": w.bits, "mode": w.mode}
