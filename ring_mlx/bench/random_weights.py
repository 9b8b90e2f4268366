"""Models at true shapes with random quantized weights, so that speed can be measured without a download.

Packed words and scales are drawn as such, one tensor at a time: no weight ever exists in full precision, so building
takes the memory of the model and of one tensor more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ring_mlx.bench.shapes import SHAPES, cut
from ring_mlx.checkpoint.weights import give
from ring_mlx.distributed.loading import share
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model
from ring_mlx.model.moe import bundle_experts


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
    """A model of a shape of `SHAPES` with random weights, evaluated.

    Args:
        bits: Of all matrices but the router; None leaves them as they are.
        layers: So many layers instead of the model's own number.
        dtype: Of what is not quantized, by default `plain_dtype`.

    Raises:
        NoFitError: If this machine's memory cannot hold it; nothing has been made then.
    """
    dtype = plain_dtype(shape) if dtype is None else dtype
    return random_model_of(cut(SHAPES[shape], layers), shape, bits, group_size, exact, dtype, seed)


def plain_dtype(shape: str) -> mx.Dtype:
    """The dtype of weights that are not quantized: bfloat16, but float32 on MLX's CPU backend and for tiny shapes."""
    return mx.float32 if shape in ("tiny", "golden") or mx.default_device() == mx.cpu else mx.bfloat16


def random_model_of(
    raw: dict[str, Any], name: str, bits: int | None, group_size: int, exact: bool, dtype: mx.Dtype, seed: int
) -> Model:
    """As `random_model`, for any config.json."""
    model = empty_model(RingConfig.from_dict(raw), bits, group_size, exact)
    arrays = draw(model, dtype, seed)
    memory.claim(model.config, sum(a.nbytes for a in arrays.values()), name)
    memory.bound_memory()
    return fill(model, arrays)


def random_sharded(
    group: mx.distributed.Group, mode: str, *, make: Callable[[], Model], name: str, dtype: mx.Dtype, seed: int
) -> Model:
    """This rank's part of an `empty_model` with random weights, as `ring_mlx.distributed.loading.load_sharded`."""

    def whole() -> tuple[Model, dict[str, mx.array], str]:
        model = make()
        arrays = draw(model, dtype, seed)
        # What comes next in the sequence tells whether all before it was the same.
        identity = seed, [(n, a.shape) for n, a in arrays.items()], mx.random.randint(0, 1 << 30, (4,)).tolist()
        return model, arrays, hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    return share(whole, group, mode, name)


def empty_model(config: RingConfig, bits: int | None, group_size: int, exact: bool) -> Model:
    """A model with shapes, whose arrays are not computed."""
    model = Model(config, exact=exact)
    if bits is not None:
        nn.quantize(
            model,
            group_size,
            bits,
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and not path.endswith("gate.gate_proj"),
        )
    return model


def draw(model: Model, dtype: mx.Dtype, seed: int) -> dict[str, mx.array]:
    """Random arrays for all parameters by name, the same for a seed whichever of them are computed; none is yet."""
    mx.random.seed(seed)
    arrays: dict[str, mx.array] = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        arrays |= {f"{path}.{name}": array for name, array in _drawn(path, module, dtype).items()}
    for i, layer in enumerate(model.layers):
        if "gate" in layer.mlp and "expert_bias" in layer.mlp.gate:
            name = f"model.layers.{i}.mlp.gate.expert_bias"
            arrays[name] = 0.01 * mx.random.normal((model.config.num_experts,))
    return arrays


def fill(model: Model, arrays: dict[str, mx.array]) -> Model:
    """Give a model its arrays and compute them one at a time; it is in evaluation mode then."""
    give(model, arrays)
    for array in arrays.values():
        mx.eval(array)
        mx.clear_cache()
    arrays.clear()
    for layer in model.layers:
        bundle_experts(layer.mlp)
        mx.clear_cache()
    return model


def _dtype(path: str, dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if ".mlp.gate." in path else dtype


def _drawn(path: str, module: nn.Module, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Random arrays of one leaf module's shapes."""
    if "scales" in module:
        count = (1 << module.bits) - 1
        fan_in = module.scales.shape[-1] * module.group_size
        step = math.sqrt(12 / fan_in) / count  # evenly spread levels have the deviation (count + 1) * step / sqrt(12)
        words = random_words(module.weight.shape)
        scales = (step * mx.random.uniform(0.75, 1.25, module.scales.shape)).astype(dtype)
        return {"weight": words, "scales": scales, "biases": scales * (-count / 2)}
    if "weight" not in module:
        return {}
    shape, target = module.weight.shape, _dtype(path, dtype)
    if len(shape) == 1:
        return {"weight": (1 + 0.1 * mx.random.normal(shape)).astype(target)}
    return {"weight": mx.random.normal(shape, dtype=target, scale=shape[-1] ** -0.5)}


def random_words(shape: tuple[int, ...]) -> mx.array:
    """Evenly distributed 32-bit words; MLX has no function for them."""
    seed = mx.random.randint(0, 1 << 24).astype(mx.uint32)
    return _mix(mx.arange(math.prod(shape), dtype=mx.uint32), seed).reshape(shape)


@mx.compile
def _mix(x: mx.array, seed: mx.array) -> mx.array:
    """The finaliser of MurmurHash3 over counters."""
    x = x * mx.array(0x9E3779B1, mx.uint32) + seed
    x = (x ^ (x >> 16)) * mx.array(0x85EBCA6B, mx.uint32)
    x = (x ^ (x >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    return x ^ (x >> 16)
