"""The two kinds of attention layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.models.rope_utils import YarnRoPE, initialize_rope

from metal_kernels import (
    Heads,
    add_qmv,
    few_queries,
    gate_qmv,
    launch,
    linear_gate,
    norm_qmv,
    qk_norm_rope,
    qkv_lightning_attn,
    resident,
)
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decay import decay_rate
from ring_mlx.model.kernel_weights import KernelMatrices
from ring_mlx.model.rope_scaling import attention_factor

Result = tuple[mx.array, "mx.array | None"]


class _Attention(nn.Module):
    """Shared by both kinds: the fused projection, norms of q and k per head, then partial rotary embedding."""

    def __init__(self, config: RingConfig, num_key_value_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        width = self.num_heads * self.head_dim
        fused = width + 2 * num_key_value_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.use_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        if config.use_qk_norm:
            self.query_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            config.rope_dims,
            config.rope_theta,
            traditional=False,
            scaling_config=dict(config.rope_scaling) if config.rope_scaling else None,
            max_position_embeddings=config.max_position_embeddings,
        )
        if isinstance(self.rope, YarnRoPE) and config.rope_scaling:
            self.rope.mscale = attention_factor(config.rope_scaling)
        self._eps = config.rms_norm_eps
        inv_freq, self._rope_scale = _rotation(self.rope, config.rope_dims)
        self._inv_freq = _constant(inv_freq)
        self._into, self._out_of = KernelMatrices(), KernelMatrices()

    def heads(self) -> Heads:
        """How the projection splits into heads, with the norms' present weights."""
        has_norms = "query_layernorm" in self
        return Heads(
            self.num_heads,
            self.num_key_value_heads,
            self.query_layernorm.weight if has_norms else None,
            self.key_layernorm.weight if has_norms else None,
            self._eps,
            self._inv_freq,
            self._rope_scale,
            self.rope,
        )

    def project(self, x: mx.array, norm: nn.RMSNorm, *layers: nn.Module) -> tuple[mx.array, ...]:
        """Each layer of the normed x: one dispatch for a few tokens."""
        dtype = norm.weight.dtype
        has_kernels = launch.backend() is not None  # asked here first, since the rest costs Python time for each layer
        found = norm_qmv(x, norm.weight, norm.eps, self._into(*layers), dtype) if has_kernels else None
        if found is not None:
            return found
        normed = norm(x).astype(dtype)
        return tuple(layer(normed) for layer in layers)


class SoftmaxAttention(_Attention):
    """Causal grouped-query softmax attention.

    ::

        o = softmax(q k^T * head_dim^-0.5 + mask) v,  y = dense(o)
    """

    def __init__(self, config: RingConfig) -> None:
        super().__init__(config, config.num_key_value_heads)

    def __call__(
        self, x: mx.array, norm: nn.RMSNorm, mask: mx.array | str | None, cache: Any | None, offset: int | mx.array
    ) -> Result:
        """Attend over the cache and the normed residual stream x [B, T, hidden].

        Args:
            mask: True where a query may look, "causal", or None for one token.
            cache: A cache with mlx-lm's ``update_and_fetch``, or None.
            offset: Position of the first token, one for all rows or [B].

        Returns:
            The residual stream, and y [B, T, hidden], which is still to be added to it; None if it has been.
        """
        q, k, v = self.open(x, norm, offset)
        return self.close(x, self.attend(q, k, v, mask, cache, offset))

    def open(self, x: mx.array, norm: nn.RMSNorm, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The new q [B, heads, T, D], k and v [B, kv_heads, T, D]."""
        (qkv,) = self.project(x, norm, self.query_key_value)
        return qk_norm_rope(qkv, self.heads(), offset)

    def attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        mask: mx.array | str | None,
        cache: Any | None,
        offset: int | mx.array,
        by_kernel: Callable[..., mx.array | None] = few_queries,
    ) -> mx.array:
        """The output of the heads, [B, T, heads D]; the cache takes k and v."""
        B, _, T, _ = q.shape
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
            is_batch = isinstance(cache, BatchKVCache) and cache._right_padding is None
            if is_batch or type(cache) is KVCache:  # whose arrays the kernel reads as they are
                padding = cache.left_padding if is_batch else None
                found = by_kernel(q, cache.keys, cache.values, offset, self.scale, padding)
                if found is not None:
                    return found
        o = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return o.transpose(0, 2, 1, 3).reshape(B, T, -1)

    def close(self, x: mx.array, o: mx.array) -> Result:
        """Through the output projection; returns what `__call__` does."""
        added = None if launch.backend() is None else add_qmv(o, self._out_of(self.dense), x)
        return (x, self.dense(o)) if added is None else (added, None)


class LinearAttention(_Attention):
    """Lightning attention with grouped norm and output gate.

    ::

        S_t = exp(-s) S_{t-1} + k_t v_t^T,  o_t = head_dim^-0.5 q_t S_t
        y = dense(g_norm(o) * sigmoid(g_proj(x)))

    The state S and the decay are float32 whatever the weights are.
    """

    def __init__(self, config: RingConfig, layer: int) -> None:
        super().__init__(config, config.num_attention_heads)
        width = self.num_heads * self.head_dim
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.g_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.groups = config.group_norm_size
        rates = decay_rate(self.num_heads, layer, config.num_hidden_layers, config.decay_layer_offset)
        self._decay_rate = _constant(rates)

    @property
    def decay_rate(self) -> mx.array:
        """s of each head, [H] float32; not a parameter, so no cast of the weights rounds it."""
        return self._decay_rate

    def __call__(
        self, x: mx.array, norm: nn.RMSNorm, mask: mx.array | None, cache: Any | None, offset: int | mx.array
    ) -> Result:
        """Fold x into the state and read it out; contract as `SoftmaxAttention.__call__`.

        Args:
            mask: True where a token counts [B, T], or None for all.
            cache: A cache whose item 0 is the state [B, H, K, V] float32 or None, or no cache.
        """
        qkv, gate = self.project(x, norm, self.query_key_value, self.g_proj)
        before = None if cache is None else cache[0]
        o, state = self.fold(qkv, before, mask, offset)
        if cache is not None:
            cache[0] = state
            if hasattr(cache, "tentative"):
                cache.tentative.append(Folded(self, cache, qkv, before, mask, offset))
        return self.close_gated(x, o, gate)

    def recur(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        state: mx.array | None,
        mask: mx.array | None,
        offset: int | mx.array,
        each: bool = False,
    ) -> tuple[Result, mx.array, mx.array]:
        """The same, from a given state; also returns the next state as `fold` does, and the projection that went into it."""
        qkv, gate = self.project(x, norm, self.query_key_value, self.g_proj)
        o, state = self.fold(qkv, state, mask, offset, each)
        return self.close_gated(x, o, gate), state, qkv

    def fold(
        self,
        qkv: mx.array,
        state: mx.array | None,
        mask: mx.array | None,
        offset: int | mx.array,
        each: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """The output of the heads for projected tokens qkv [B, T, 3 H D], and the state after them or after each [T, ...]."""
        return qkv_lightning_attn(qkv, self.heads(), self._decay_rate, self.scale, offset, state, mask, each)

    def close_gated(self, x: mx.array, o: mx.array, gate: mx.array) -> Result:
        """Through norm, gate and output projection; returns what `__call__` does."""
        gated = o, gate, self.g_norm.weight, self.groups, self.g_norm.eps
        added = None if launch.backend() is None else gate_qmv(*gated, self._out_of(self.dense), x)
        return (x, self.dense(linear_gate(*gated))) if added is None else (added, None)


class Folded(NamedTuple):
    """Tokens that a linear layer has folded into its cache's state, so that fewer of them can be folded instead."""

    attention: LinearAttention
    cache: Any
    qkv: mx.array
    before: mx.array | None
    mask: mx.array | None
    offset: int | mx.array

    def keep(self, counts: tuple[int, ...]) -> None:
        """Fold only the first so many tokens of each row; in a row with fewer than another the rest counts as padding."""
        state, most = self.before, max(counts)
        if most:
            mask = None if self.mask is None else self.mask[:, :most]
            if min(counts) < most:
                counted = first_of(counts, most)
                mask = counted if mask is None else mask & counted
            _, state = self.attention.fold(self.qkv[:, :most], self.before, mask, self.offset)
        self.cache[0] = state


@lru_cache(maxsize=256)
def first_of(counts: tuple[int, ...], width: int) -> mx.array:
    """True for the first so many of each row's few tokens, [B, width], in memory that the GPU itself wrote (see `resident`)."""
    mask = mx.contiguous((mx.arange(32) < mx.array(counts)[:, None])[:, :width])
    mx.eval(mask)
    return mask


def _constant(x: mx.array) -> mx.array:
    """x computed now by this thread and kept in memory, like weights."""
    x = resident(x)
    mx.eval(x)
    return x


def _rotation(rope: nn.Module, dims: int) -> tuple[mx.array, float]:
    """Rotation a position of each pair [dims/2] float32, and the factor of the rotated dims, of mlx-lm's rope."""
    if isinstance(rope, nn.RoPE):
        powers = [rope.scale * rope.base ** (-i / dims) for i in range(0, dims, 2)]
        return mx.array(powers, dtype=mx.float32), 1.0
    return 1.0 / rope._freqs.astype(mx.float32), float(rope.mscale)
