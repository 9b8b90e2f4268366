"""Residual, RMSNorm and the router's product in one step."""

from metal_kernels.norm_router.fused import fused_add_norm, fused_norm_router
from metal_kernels.norm_router.naive import naive_add_norm, naive_norm_router

__all__ = ["fused_add_norm", "fused_norm_router", "naive_add_norm", "naive_norm_router"]
