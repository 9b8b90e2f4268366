"""A matrix, or a stack of one per expert, as MLX stores it: plain or quantised."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Packed(NamedTuple):
    """Weights [..., N, K], of which MLX packs K.

    ``mode`` is that of ``mx.quantize`` ("affine", "mxfp4", "mxfp8", "nvfp4"), or "plain" for an array of floats with
    ``bits`` 16 or 32 and no scales. Quantised: ``weight`` is [..., N, K * bits / 32] uint32, a little-endian stream of
    ``bits`` a value; ``scales`` [..., N, K / group_size], and for "affine" ``biases`` of the same shape and dtype:
    value = scale * q + bias.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 16
    group_size: int = 0
    mode: str = "plain"

    def dequantize(self) -> mx.array:
        """The weights as floats [..., N, K], float32 for plain and affine, exactly what the kernels multiply by."""
        if self.mode == "plain" or self.scales is None:
            return self.weight.astype(mx.float32)
        scales, biases = self.scales, self.biases
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(self.weight, scales, biases, self.group_size, self.bits, mode=self.mode, dtype=mx.float32)
