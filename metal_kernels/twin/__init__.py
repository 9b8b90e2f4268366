"""The CUDA twin: runs the Metal source of this package on an NVIDIA GPU."""

from metal_kernels.twin.kernel import TwinKernel, metal_kernel

__all__ = ["TwinKernel", "metal_kernel"]
