"""Mixture of SwiGLU experts over MLX's packed weights, with the shared expert and the residual."""

from metal_kernels.quantized_moe.decode import check_decode, decode_moe
from metal_kernels.quantized_moe.experts import Experts, plain_moe
from metal_kernels.quantized_moe.prefill import check_prefill, prefill_moe

__all__ = ["Experts", "check_decode", "check_prefill", "decode_moe", "plain_moe", "prefill_moe"]
