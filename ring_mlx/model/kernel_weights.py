"""The weights of layers as the kernels take them, kept until a layer's arrays are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Experts, Matrices, Packed, launch
from metal_kernels.packed import bundle

# Which multiply and do no more; an embedding is also a head.
MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


def packed(module: nn.Module) -> Packed:
    """A linear layer's weights, quantized or not."""
    if "scales" not in module:
        return Packed(module.weight)
    form = module.bits, module.group_size, getattr(module, "mode", "affine")
    return Packed(module.weight, module.scales, module.get("biases"), *form)


class _Kept:
    def __init__(self) -> None:
        self._arrays: list[mx.array] = []
        self._made: Any = None

    def _of(self, modules: Sequence[nn.Module], make: Callable[..., Any]) -> Any:
        arrays = [m[name] for m in modules for name in ("weight", "scales", "biases") if name in m]
        if len(arrays) != len(self._arrays) or not all(map(is_, arrays, self._arrays)):
            self._arrays, self._made = arrays, make(*map(packed, modules))
        return self._made


class KernelMatrices(_Kept):
    """Of one or two linear layers that share an input."""

    def __call__(self, *modules: nn.Module) -> Matrices | None:
        """None where no kernels run, or a layer does more than multiply."""
        if launch.backend() is None or any(type(m) not in MATRICES or "bias" in m for m in modules):
            return None
        found: Matrices = self._of(modules, Matrices)
        return found


class KernelExperts(_Kept):
    """Of gate, up and down of a layer's routed experts, then of its shared expert if there is one."""

    def bundle(self, *modules: nn.Module) -> None:
        """Put all arrays into one buffer, of which the modules' become parts; one copy of them exists besides meanwhile."""
        names = [(m, name) for m in modules for name in ("weight", "scales", "biases") if name in m]
        found = None if self(*modules) is None else bundle([m[name] for m, name in names])
        if found is None:
            return
        buffer, parts = found
        for (module, name), part in zip(names, parts, strict=True):
            module[name] = part
        self._arrays, self._made = parts, replace(_experts(*map(packed, modules)), buffer=buffer)

    def __call__(self, *modules: nn.Module) -> Experts | None:
        """None where a layer has no weight of its own, such as one with an adapter, or has a bias."""
        if any("weight" not in m or "bias" in m for m in modules):
            return None
        found: Experts = self._of(modules, _experts)
        return found


def _experts(gate: Packed, up: Packed, down: Packed, *shared: Packed) -> Experts:
    return Experts(gate, up, down, (shared[0], shared[1], shared[2]) if shared else None)
