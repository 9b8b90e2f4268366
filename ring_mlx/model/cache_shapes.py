"""The shapes of a model's cache, layer by layer; arrays from a file are checked against them before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


@dataclass(frozen=True)
class Shapes:
    """The shapes of one model's cache.

    Args:
        linear: Of each layer, whether it is linear.
        heads: H of a linear layer's state [1, H, D, D] float32.
        kv_heads: Hkv of a softmax layer's keys and values [1, Hkv, T, D].
        head_dim: D.
        vocab_size: Of the logits [1, vocab] float32.
        dtype: Of keys and values.
        context_tokens: Most tokens of a sequence.
    """

    linear: tuple[bool, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: mx.Dtype
    context_tokens: int

    def most_bytes(self, count: int) -> int:
        """Most bytes that ``count`` tokens, the states after them and logits take; quantized ones take less."""
        state, token = 4 * self.heads * self.head_dim**2, 2 * self.dtype.size * self.kv_heads * self.head_dim
        layers = sum(self.linear)
        return layers * state + (len(self.linear) - layers) * token * count + 4 * self.vocab_size

    def check_count(self, count: int) -> None:
        """Check a number of tokens against the model's context; ValueError if it exceeds that."""
        if count > self.context_tokens:
            raise ValueError(f"it is of {count} tokens, more than the {self.context_tokens} of the model's context")

    def check_state(self, state: mx.array) -> None:
        """Check a linear layer's state; ValueError if the model could not have made it."""
        _hold("a state", state, (1, self.heads, self.head_dim, self.head_dim), mx.float32)

    def check_kv(self, arrays: Sequence[mx.array], layer: tuple[int, int] | None, count: int) -> None:
        """Check the keys, or the values, of ``count`` tokens as `check_state` does a state."""
        rows, D = (1, self.kv_heads, count), self.head_dim
        if layer is None:
            (plain,) = arrays
            _hold("keys or values", plain, (*rows, D), self.dtype)
            return
        bits, group_size = layer
        if bits not in BITS or group_size not in GROUP_SIZES or D % group_size:
            raise ValueError(f"{bits} bits in groups of {group_size} are impossible")
        w, scales, biases = arrays
        _hold("quantized keys or values", w, (*rows, D * bits // 32), mx.uint32)
        for part in (scales, biases):
            _hold("scales or biases", part, (*rows, D // group_size), self.dtype)

    def check_logits(self, logits: mx.array) -> None:
        """Check the logits of a token as `check_state` does a state."""
        _hold("logits", logits, (1, self.vocab_size), mx.float32)


def _hold(what: str, a: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    if a.shape != shape or a.dtype != dtype:
        raise ValueError(f"{what} {list(a.shape)} {a.dtype} where the model has {list(shape)} {dtype}")
