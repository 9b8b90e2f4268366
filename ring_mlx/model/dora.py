"""DoRA for inference. mlx-lm's own layer unpacks its weight again for every token, and not in every form."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ring_mlx.model.packing import packed


class DoRA(nn.Module):
    """A LoRA layer whose rows have the length m [rows].

    ::

        y = m / |W + scale B A| * (W x + scale B A x) + bias

    ``lora`` is mlx-lm's LoRA around ``base``, a linear layer or an embedding.
    """

    def __init__(self, lora: Any, base: Any, m: mx.array) -> None:
        super().__init__()
        self.lora = lora
        is_embedding = isinstance(base, nn.Embedding | nn.QuantizedEmbedding)
        change = lora.lora_a @ lora.lora_b
        weight = packed(base).dequantize() + lora.scale * (change if is_embedding else change.T)
        self.magnitude = m / mx.maximum(mx.linalg.norm(weight, axis=1), 1e-30)

    def __call__(self, x: mx.array) -> mx.array:
        """Of a linear layer x [..., in] to [..., out], of an embedding ids [...] to [..., dims]."""
        y = self.lora(x)
        if "linear" not in self.lora:
            return y * self.magnitude[x][..., None].astype(y.dtype)
        bias = self.lora.linear.get("bias")
        if bias is None:
            return y * self.magnitude.astype(y.dtype)
        return (y - bias) * self.magnitude.astype(y.dtype) + bias

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding as the head of a model that ties them."""
        y = self.lora.as_linear(x)
        return y * self.magnitude.astype(y.dtype)
