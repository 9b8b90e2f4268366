"""Lightning attention: linear attention with one fixed decay a head, in its plain and fast forms."""

from metal_kernels.lightning_attn.chunk import chunk_lightning_attn
from metal_kernels.lightning_attn.fused_recurrent import fused_qkv_lightning_attn
from metal_kernels.lightning_attn.naive import naive_lightning_attn, naive_qkv_lightning_attn
from metal_kernels.lightning_attn.simd_chunk import simd_chunk_lightning_attn

__all__ = [
    "chunk_lightning_attn",
    "fused_qkv_lightning_attn",
    "naive_lightning_attn",
    "naive_qkv_lightning_attn",
    "simd_chunk_lightning_attn",
]
