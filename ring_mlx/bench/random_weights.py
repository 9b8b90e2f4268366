"""Models at true shapes with random quantised weights, so that speed can be measured without a download.

Packed words and scales are drawn as such, one tensor at a time: no weight ever exists in full precision, so building
takes the memory of the model and of one tensor more.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ring_mlx import memory
from ring_mlx.bench.shapes import SHAPES, cut
from ring_mlx.config import RingConfig
from ring_mlx.model import Model


def random_model(
    shape: str,
    bits: int | None = 4,
    group_size: int = 64,
    exact: bool = False,
    *,
    layers: int | None = None,
    dtype: mx.Dtype | None = None,
    seed: int = 0,
) -> Model:
    """A model of a known shape with random weights.

    Args:
        shape: A key of `SHAPES`.
        bits: Of all matrices but the router; None leaves them as they are.
        group_size: Of the quantisation.
        exact: As for `Model`.
        layers: So many layers instead of the model's own number.
        dtype: Of what is not quantised; by default bfloat16, but float32 on MLX's CPU backend and for the tiny shapes.
        seed: Of all weights.

    Returns:
        The model, in evaluation mode, its weights evaluated.

    Raises:
        NoFitError: If this machine's memory cannot hold it; nothing has been made then.
    """
    if dtype is None:
        dtype = mx.float32 if shape in ("tiny", "golden") or mx.default_device() == mx.cpu else mx.bfloat16
    return random_model_of(cut(SHAPES[shape], layers), shape, bits, group_size, exact, dtype, seed)


def random_model_of(
    raw: dict[str, Any], name: str, bits: int | None, group_size: int, exact: bool, dtype: mx.Dtype, seed: int
) -> Model:
    """As `random_model`, for any config.json."""
    config = RingConfig.from_dict(raw)
    model = Model(config, exact=exact)
    if bits is not None:
        nn.quantize(
            model,
            group_size,
            bits,
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and not path.endswith("gate.gate_proj"),
        )
    targets = {path: _dtype(path, p, dtype) for path, p in tree_flatten(model.parameters())}
    needed = sum(p.size * targets[path].size for path, p in tree_flatten(model.parameters()))
    memory.check_fit(config, needed, name)
    memory.bound_memory()
    mx.random.seed(seed)
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        _fill(path, module, dtype)
    for layer in model.layers:
        if "gate" in layer.mlp and "expert_bias" in layer.mlp.gate:
            layer.mlp.gate.expert_bias = 0.01 * mx.random.normal((config.num_experts,))
    mx.eval(model.parameters())
    mx.clear_cache()
    model.eval()
    return model


def _dtype(path: str, parameter: mx.array, dtype: mx.Dtype) -> mx.Dtype:
    if ".mlp.gate." in path:
        return mx.float32
    return dtype if mx.issubdtype(parameter.dtype, mx.floating) else parameter.dtype


def _fill(path: str, module: nn.Module, dtype: mx.Dtype) -> None:
    """Give one leaf module random arrays of its shapes; they are evaluated before the next one's are made."""
    if "scales" in module:
        count = (1 << module.bits) - 1
        fan_in = module.scales.shape[-1] * module.group_size
        step = math.sqrt(12 / fan_in) / count  # evenly spread levels have the deviation (count + 1) * step / sqrt(12)
        module.weight = random_words(module.weight.shape)
        module.scales = (step * mx.random.uniform(0.75, 1.25, module.scales.shape)).astype(dtype)
        module.biases = module.scales * (-count / 2)
    elif "weight" in module:
        shape = module.weight.shape
        target = _dtype(f"{path}.weight", module.weight, dtype)
        if len(shape) == 1:
            module.weight = (1 + 0.1 * mx.random.normal(shape)).astype(target)
        else:
            module.weight = mx.random.normal(shape, dtype=target, scale=shape[-1] ** -0.5)
    mx.eval(module.parameters())
    mx.clear_cache()


def random_words(shape: tuple[int, ...]) -> mx.array:
    """Evenly distributed 32-bit words, which MLX's own generator has no call for."""
    seed = mx.random.randint(0, 1 << 24).astype(mx.uint32)
    return _mix(mx.arange(math.prod(shape), dtype=mx.uint32), seed).reshape(shape)


@mx.compile
def _mix(x: mx.array, seed: mx.array) -> mx.array:
    """The finaliser of MurmurHash3 over counters."""
    x = x * mx.array(0x9E3779B1, mx.uint32) + seed
    x = (x ^ (x >> 16)) * mx.array(0x85EBCA6B, mx.uint32)
    x = (x ^ (x >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    return x ^ (x >> 16)
