"""Linear layers as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Experts, Matrices, Packed


def packed(module: nn.Module) -> Packed:
    """A linear layer's weights, quantized or not, as a kernel reads them."""
    if "scales" not in module:
        return Packed(module.weight)
    return Packed(
        module.weight,
        module.scales,
        module.get("biases"),
        module.bits,
        module.group_size,
        getattr(module, "mode", "affine"),
    )


class PackedLayers:
    """One or two linear layers that share an input, prepared again when a module's arrays have changed."""

    def __init__(self) -> None:
        self._arrays: list[mx.array] = []
        self._matrices: Matrices | None = None

    def __call__(self, *modules: nn.Module) -> Matrices | None:
        """Their matrices, or None where a layer does more than multiply."""
        if any(type(m) not in (nn.Linear, nn.QuantizedLinear) or "bias" in m for m in modules):
            return None
        arrays = _arrays(modules)
        if self._matrices is None or not _are_same(arrays, self._arrays):
            self._arrays, self._matrices = arrays, Matrices(*map(packed, modules))
        return self._matrices


class PackedExperts:
    """The experts of a layer and the shared one, prepared again when a module's arrays have changed."""

    def __init__(self) -> None:
        self._arrays: list[mx.array] = []
        self._experts: Experts | None = None

    def __call__(self, *modules: nn.Module) -> Experts | None:
        """Of gate, up and down of the routed experts, then of the shared expert if there is one.

        None where a layer has no weight of its own, such as one with an adapter, or has a bias.
        """
        if any("weight" not in m or "bias" in m for m in modules):
            return None
        arrays = _arrays(modules)
        if self._experts is None or not _are_same(arrays, self._arrays):
            gate, up, down, *shared = map(packed, modules)
            others = (shared[0], shared[1], shared[2]) if shared else None
            self._arrays, self._experts = arrays, Experts(gate, up, down, others)
        return self._experts


def _arrays(modules: Sequence[nn.Module]) -> list[mx.array]:
    return [m[name] for m in modules for name in ("weight", "scales", "biases") if name in m]


def _are_same(arrays: Sequence[mx.array], others: Sequence[mx.array]) -> bool:
    return len(arrays) == len(others) and all(a is b for a, b in zip(arrays, others, strict=True))
