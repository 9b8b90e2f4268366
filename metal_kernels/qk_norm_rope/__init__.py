"""QK-norm, rotary embedding and split of the fused projection."""

from metal_kernels.qk_norm_rope.fused import fused_qk_norm_rope
from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope

__all__ = ["fused_qk_norm_rope", "naive_qk_norm_rope"]
