"""Tensor parallelism: each rank holds a share of every layer; one sum over the ranks ends each block.

Matrices that widen (queries, keys and values, gates, up) are cut by rows, those that narrow again (dense, down) by
columns. MLX's `shard_inplace` cuts; its sharded linear layers are not used, since they always communicate, and
kernels are tested on each rank alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.core import array
from mlx.nn.layers.distributed import shard_inplace

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.model.attention import LinearAttention, SoftmaxAttention
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decode_step import DecodeStep
from ring_mlx.model.model import LanguageModel, Model
from ring_mlx.model.moe import MoE

AFFINE_GROUPS = (64, 32)
ROUTER = "mlp.gate.gate_proj"
WIDENS, NARROWS = ("gate_proj", "up_proj", "g_proj", "g_norm"), ("dense", "down_proj")


def local_config(config: RingConfig, size: int) -> RingConfig:
    """The configuration of one rank's share of every layer; DistributedError names what does not divide.

    Where there are fewer heads of keys and values than ranks, ranks that share one hold it each.
    """
    c = config
    for name, value in _divided(c).items():
        if value % size:
            raise DistributedError(
                f"{name} {value} does not divide among {size} ranks; use another number of ranks, or "
                "--distributed pipeline."
            )
    kv = c.num_key_value_heads
    if kv % size and size % kv:
        raise DistributedError(
            f"num_key_value_heads {kv} neither divides among {size} ranks nor repeats evenly on them; use another "
            "number of ranks, or --distributed pipeline."
        )
    shared = c.num_shared_experts * c.moe_shared_expert_intermediate_size
    return replace(
        c,
        num_attention_heads=c.num_attention_heads // size,
        num_key_value_heads=max(1, kv // size),
        group_norm_size=max(1, c.group_norm_size // size),
        intermediate_size=c.intermediate_size // size,
        moe_intermediate_size=c.moe_intermediate_size // size,
        num_shared_experts=1 if shared else 0,
        moe_shared_expert_intermediate_size=shared // size,
    )


def _divided(c: RingConfig) -> dict[str, int]:
    """The sizes that must divide among the ranks, by their names in config.json."""
    layers = range(c.num_hidden_layers)
    sizes = {"num_attention_heads": c.num_attention_heads}
    if any(c.is_linear(i) for i in layers):
        sizes["group_norm_size"] = c.group_norm_size
    if not all(c.is_moe(i) for i in layers):
        sizes["intermediate_size"] = c.intermediate_size
    if any(c.is_moe(i) for i in layers):
        sizes["moe_intermediate_size"] = c.moe_intermediate_size
        if c.num_shared_experts:
            total = c.num_shared_experts * c.moe_shared_expert_intermediate_size
            sizes["num_shared_experts x moe_shared_expert_intermediate_size"] = total
    return sizes


def check(model: Model, size: int) -> RingConfig:
    """As `local_config`; also names a quantized matrix that would be cut within a group."""
    config = local_config(model.config, size)
    for path, module in model.named_modules():
        if path.endswith(NARROWS) and "scales" in module:
            _group_size(path, module, size)
    return config


def cut(model: Model, group: mx.distributed.Group) -> None:
    """Leave this rank's share of every matrix; nothing is computed."""
    for layer in model.layers:
        _cut_attention(layer.attention, group)
    for path, module in model.named_modules():
        if path.endswith(NARROWS):
            _narrow(path, module, group)
        elif path.endswith(WIDENS) and not path.endswith(ROUTER):
            shard_inplace(module, "all-to-sharded", group=group)


def _cut_attention(attention: SoftmaxAttention | LinearAttention, group: mx.distributed.Group) -> None:
    rank, size = group.rank(), group.size()
    heads, kv, D = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    qkv = attention.query_key_value
    if kv < size:
        each = size // kv
        order = mx.array([*range(heads), *(heads + i // each for i in range(2 * size))])
        rows = (order[:, None] * D + mx.arange(D)).flatten()
        qkv.update({name: array[rows] for name, array in qkv.parameters().items()})
        kv = size
    shard_inplace(qkv, "all-to-sharded", segments=[heads * D, (heads + kv) * D], group=group)
    attention.num_heads, attention.num_key_value_heads = heads // size, kv // size
    if isinstance(attention, LinearAttention):
        attention.groups //= size
        own = attention.num_heads
        attention._decay_rate = mx.contiguous(attention.decay_rate[rank * own : (rank + 1) * own])


def _narrow(path: str, module: nn.Module, group: mx.distributed.Group) -> None:
    """Split affine groups that would be cut into smaller ones with the same scale and bias, which changes no value."""
    if "scales" in module:
        smaller = _group_size(path, module, group.size())
        times, module.group_size = module.group_size // smaller, smaller
        for name in ("scales", "biases"):
            if name in module and times > 1:
                module[name] = mx.repeat(module[name], times, axis=-1)
    if "bias" in module and group.rank():
        module.bias = mx.zeros_like(module.bias)  # rank 0 adds it
    shard_inplace(module, "sharded-to-all", group=group)


def _group_size(path: str, module: nn.Module, size: int) -> int:
    """The largest size of groups that a cut by columns leaves whole."""
    old, width = module.group_size, module.weight.shape[-1] * 32 // module.bits
    part = width // size
    fits = [g for g in (old, *AFFINE_GROUPS) if part % g == 0 and old % g == 0]
    if not fits or (fits[0] != old and "biases" not in module):
        raise DistributedError(
            f"{path} has {width} columns in groups of {old}, which cannot be cut into {size} parts of {part}; use "
            "fewer ranks, --distributed pipeline, or a conversion with groups of 32."
        )
    return int(fits[0])


def adopt(kind: type[Any], module: nn.Module, group: mx.distributed.Group) -> Any:
    """The module as a `kind` that talks to the group; parameters, children and settings stay."""
    new: Any = dict.__new__(kind)
    dict.update(new, module)
    new.__dict__.update(vars(module), _group=group)
    return new


class SummedLinear(nn.Linear):
    """A linear layer cut by columns; the sum over all ranks, in the dtype of the activations."""

    def __call__(self, x: array) -> array:
        return mx.distributed.all_sum(super().__call__(x), group=self._group)


class SummedQuantizedLinear(nn.QuantizedLinear):
    """The same of a quantized layer."""

    def __call__(self, x: array) -> array:
        return mx.distributed.all_sum(super().__call__(x), group=self._group)


class SummedMoE(MoE):
    """Part of the inner dimension of every expert; the router is whole. Same contract as `MoE`."""

    def __call__(
        self, x: array, dtype: mx.Dtype | None = None, residual: array | None = None, logits: array | None = None
    ) -> array:
        """Mix the experts; summed over the ranks in float32 before the residual is added."""
        y = mx.distributed.all_sum(super().__call__(x, dtype, None, logits), group=self._group)
        return y if residual is None else (residual.astype(mx.float32) + y).astype(residual.dtype)


class TensorModel(LanguageModel):
    """A cut model whose blocks end in sums over the ranks."""

    def _decode_step(self) -> DecodeStep | None:
        return None  # a sum over ranks inside a compiled step has not been tried on Metal


def connect(model: LanguageModel, group: mx.distributed.Group) -> LanguageModel:
    """A cut model whose parts sum up."""
    for layer in model.layers:
        for block, name in ((layer.attention, "dense"), (layer.mlp, "down_proj")):
            if name in block:
                kind = SummedQuantizedLinear if "scales" in block[name] else SummedLinear
                block[name] = adopt(kind, block[name], group)
        if isinstance(layer.mlp, MoE):
            layer.mlp = adopt(SummedMoE, layer.mlp, group)
    whole: LanguageModel = adopt(TensorModel, model, group)
    return whole
