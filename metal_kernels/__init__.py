"""Operations of the Ring-linear models, each a folder with its plain form; knows arrays, not checkpoints or models."""

from metal_kernels.lightning_attn import chunk_lightning_attn, lightning_attn, naive_lightning_attn
from metal_kernels.linear_gate import linear_gate
from metal_kernels.router import route

__all__ = ["chunk_lightning_attn", "lightning_attn", "linear_gate", "naive_lightning_attn", "route"]
