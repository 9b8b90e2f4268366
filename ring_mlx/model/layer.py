"""One decoder layer: attention, then experts or a dense block, each behind a norm and added to the residual stream."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import add_norm
from ring_mlx.model.attention import LinearAttention, SoftmaxAttention
from ring_mlx.model.config import RingConfig
from ring_mlx.model.moe import MLP, MoE


class DecoderLayer(nn.Module):
    """``x + attention(rmsnorm(x))``, then ``x + mlp(rmsnorm(x))``."""

    def __init__(self, config: RingConfig, layer: int) -> None:
        super().__init__()
        self.is_linear = config.is_linear(layer)
        self.attention = LinearAttention(config, layer) if self.is_linear else SoftmaxAttention(config)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Any, cache: Any | None, offset: int | mx.array, last_only: bool = False
    ) -> mx.array:
        """Advance the residual stream x [B, T, hidden], in the dtype it comes in; with ``last_only`` to [B, 1, hidden]."""
        x, r = self.attention(x, self.input_layernorm, mask, cache, offset)
        if last_only:
            x, r = x[:, -1:], None if r is None else r[:, -1:]
        return self._feed_forward(x, r)

    def recur(
        self, x: mx.array, state: mx.array, offset: mx.array, mask: mx.array | None, each: bool = False
    ) -> tuple[mx.array, mx.array, mx.array]:
        """A linear layer from one state to the next, both [B, H, K, V], or with ``each`` to those after each token,
        [T, B, H, K, V]; also the projection of x that went into it."""
        (x, r), state, qkv = self.attention.recur(x, self.input_layernorm, state, mask, offset, each)
        return self._feed_forward(x, r), state, qkv

    def open(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """A softmax layer up to q, k and v."""
        return self.attention.open(x, self.input_layernorm, offset)

    def close(self, x: mx.array, o: mx.array) -> mx.array:
        """A softmax layer from the output of its heads, o [B, T, heads D], to the end."""
        return self._feed_forward(*self.attention.close(x, o))

    def _feed_forward(self, x: mx.array, r: mx.array | None) -> mx.array:
        """x + r through the experts or the dense block."""
        norm, dtype = self.post_attention_layernorm, self.input_layernorm.weight.dtype
        if isinstance(self.mlp, MoE):
            x, normed, logits = self.mlp.gate.score(x, r, norm, dtype)
            return self.mlp(normed, dtype, x, logits)
        added = self.mlp.after_norm(x, norm, dtype) if r is None else None
        if added is not None:
            return added
        x, normed = add_norm(x, r, norm.weight, norm.eps, dtype)
        return x + self.mlp(normed).astype(x.dtype)
