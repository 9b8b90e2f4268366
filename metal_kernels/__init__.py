"""Operations of the Ring-linear models, each a folder with its plain form."""

from metal_kernels.affine_fit.naive import Effort
from metal_kernels.dispatch import (
    add_norm,
    add_qmv,
    affine_fit,
    embed,
    few_queries,
    gate_qmv,
    head,
    lightning_attn,
    linear_gate,
    moe_kernel,
    norm_qmv,
    norm_router,
    peak,
    qk_norm_rope,
    qkv_lightning_attn,
    route,
    routed_moe,
)
from metal_kernels.heads import Heads
from metal_kernels.launch import resident
from metal_kernels.lightning_attn.chunk import chunk_lightning_attn
from metal_kernels.lightning_attn.naive import naive_lightning_attn
from metal_kernels.packed import Matrices, Packed
from metal_kernels.quantized_moe.experts import Experts

__all__ = [
    "Effort",
    "Experts",
    "Heads",
    "Matrices",
    "Packed",
    "add_norm",
    "add_qmv",
    "affine_fit",
    "chunk_lightning_attn",
    "embed",
    "few_queries",
    "gate_qmv",
    "head",
    "lightning_attn",
    "linear_gate",
    "moe_kernel",
    "naive_lightning_attn",
    "norm_qmv",
    "norm_router",
    "peak",
    "qk_norm_rope",
    "qkv_lightning_attn",
    "resident",
    "route",
    "routed_moe",
]
