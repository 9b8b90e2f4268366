"""The Metal simulator: type-checks, runs and race-checks Metal kernels on x86-64 Linux."""

from tests.metal_sim.kernel import SimulatedKernel, metal_kernel
from tests.metal_sim.runtime import MetalRunError, Options, RunInfo
from tests.metal_sim.toolchain import MetalCompileError, why_unavailable

__all__ = [
    "MetalCompileError",
    "MetalRunError",
    "Options",
    "RunInfo",
    "SimulatedKernel",
    "metal_kernel",
    "why_unavailable",
]
