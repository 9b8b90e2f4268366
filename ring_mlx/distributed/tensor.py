"""Layers whose matrices are shared among ranks; one sum over the ranks ends each block.

The blocks are those of the whole model, built for a share (see `plan.local_config`): kernels and plain forms are chosen
as ever. Only what ends a block differs: its residual is added after the sum. Steps are not compiled in pieces, since a
sum over ranks inside one has not been tried on Metal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import add_qmv, gate_qmv, launch, linear_gate, qkv_lightning_attn
from ring_mlx.distributed.ranks import Ranks
from ring_mlx.model.attention import LinearAttention, Result, SoftmaxAttention
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decode_step import DecodeStep
from ring_mlx.model.layer import DecoderLayer
from ring_mlx.model.model import LanguageModel
from ring_mlx.model.moe import MLP, MoE


class Sum(Ranks):
    """The sum of an array over all ranks, in its dtype.

    Args:
        group: The ranks.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x of this rank to the sum of all; x itself within `alone`."""
        return x if self._group is None else mx.distributed.all_sum(x, group=self._group)


class ShardedSoftmaxAttention(SoftmaxAttention):
    """Some of the heads; same contract as `SoftmaxAttention`."""

    def __init__(self, config: RingConfig, total: Sum) -> None:
        super().__init__(config)
        self._total = total

    def close(self, x: mx.array, o: mx.array) -> Result:
        """Through this rank's columns of the output projection."""
        matrices = None if launch.backend() is None else self._out_of(self.dense)
        y = None if matrices is None else add_qmv(o, matrices)
        return x, self._total(self.dense(o) if y is None else y)


class ShardedLinearAttention(LinearAttention):
    """Some of the heads with their states and whole groups of the norm; same contract as `LinearAttention`."""

    def __init__(self, config: RingConfig, layer: int, decay_rate: mx.array, total: Sum) -> None:
        super().__init__(config, layer)
        self._decay_rate, self._total = decay_rate, total

    def recur(
        self, x: mx.array, norm: nn.RMSNorm, state: mx.array | None, mask: mx.array | None, offset: int | mx.array
    ) -> tuple[Result, mx.array]:
        """From one state of these heads to the next."""
        qkv, gate = self.project(x, norm, self.query_key_value, self.g_proj)
        o, state = qkv_lightning_attn(qkv, self.heads(), self._decay_rate, self.scale, offset, state, mask)
        gated = o, gate, self.g_norm.weight, self.groups, self.g_norm.eps
        matrices = None if launch.backend() is None else self._out_of(self.dense)
        y = None if matrices is None else gate_qmv(*gated, matrices)
        return (x, self._total(self.dense(linear_gate(*gated)) if y is None else y)), state


class ShardedMLP(MLP):
    """Part of the inner dimension; same contract as `MLP`."""

    def __init__(self, config: RingConfig, total: Sum) -> None:
        super().__init__(config, config.intermediate_size)
        self._total = total

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] to [..., hidden]."""
        return self._total(super().__call__(x))

    def after_norm(self, x: mx.array, norm: nn.RMSNorm, dtype: mx.Dtype) -> None:
        """Nothing: the sum over ranks comes before the residual."""


class ShardedMoE(MoE):
    """Part of the inner dimension of every expert; the router is whole. Same contract as `MoE`."""

    def __init__(self, config: RingConfig, total: Sum) -> None:
        super().__init__(config)
        self._total = total

    def __call__(
        self,
        x: mx.array,
        dtype: mx.Dtype | None = None,
        residual: mx.array | None = None,
        logits: mx.array | None = None,
    ) -> mx.array:
        """Mix the experts; summed over the ranks in float32 before the residual is added."""
        y = self._total(super().__call__(x, dtype, None, logits))
        return y if residual is None else (residual.astype(mx.float32) + y).astype(residual.dtype)


class TensorModel(LanguageModel):
    """All layers, of each a share.

    Args:
        config: Of the share.
        decay_rates: Of the share's heads [H], by layer.
        total: The sum over ranks.
    """

    def __init__(self, config: RingConfig, decay_rates: Callable[[int], mx.array], total: Sum) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            _shard(layer, config, i, decay_rates, total)

    def _decode_step(self) -> DecodeStep | None:
        return None


def _shard(layer: DecoderLayer, config: RingConfig, i: int, decay_rates: Callable[[int], Any], total: Sum) -> None:
    if layer.is_linear:
        layer.attention = ShardedLinearAttention(config, i, decay_rates(i), total)
    else:
        layer.attention = ShardedSoftmaxAttention(config, total)
    layer.mlp = ShardedMoE(config, total) if config.is_moe(i) else ShardedMLP(config, total)
