"""Products of a few tokens with packed matrices, between the operations around them."""

from metal_kernels.fused_qmv.fused import fused_add_qmv, fused_gate_qmv, fused_norm_qmv
from metal_kernels.fused_qmv.naive import naive_add_qmv, naive_gate_qmv, naive_norm_qmv

__all__ = ["fused_add_qmv", "fused_gate_qmv", "fused_norm_qmv", "naive_add_qmv", "naive_gate_qmv", "naive_norm_qmv"]
