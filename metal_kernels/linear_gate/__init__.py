"""Linear gate: grouped RMSNorm of the attention output times a sigmoid gate."""

from metal_kernels.linear_gate.fused import fused_linear_gate
from metal_kernels.linear_gate.naive import naive_linear_gate

__all__ = ["fused_linear_gate", "naive_linear_gate"]
