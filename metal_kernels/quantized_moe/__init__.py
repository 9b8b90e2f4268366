"""Mixture of SwiGLU experts over MLX's packed weights, with the shared expert and the residual."""

from metal_kernels.quantized_moe.decode import decode_moe, supports_decode
from metal_kernels.quantized_moe.experts import Experts, plain_moe
from metal_kernels.quantized_moe.naive import naive_moe
from metal_kernels.quantized_moe.prefill import prefill_moe, supports_prefill

__all__ = ["Experts", "decode_moe", "naive_moe", "plain_moe", "prefill_moe", "supports_decode", "supports_prefill"]
