"""Router: chooses experts for each token; knows nothing of the experts themselves."""

from metal_kernels.router.naive import naive_route

__all__ = ["naive_route", "route"]

route = naive_route
