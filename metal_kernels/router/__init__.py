"""Router: chooses experts for each token."""

from metal_kernels.router.fused import fused_route
from metal_kernels.router.naive import naive_route

__all__ = ["fused_route", "naive_route"]
