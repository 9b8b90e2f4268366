"""How keys and values are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from ring_mlx.errors import OptionError


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values of softmax layers are quantized; linear states never are.

    Args:
        bits: 2, 4 or 8.
        group_size: 32, 64 or 128, a divisor of head_dim.
        start: Tokens before which keys and values stay as they are.
    """

    bits: int
    group_size: int = 64
    start: int = 5000

    def check(self, head_dim: int) -> None:
        """Raises OptionError if MLX cannot quantize heads of this size."""
        if self.bits not in (2, 4, 8):
            raise OptionError(f"kv bits {self.bits} is not one of 2, 4, 8; choose one of them.")
        if self.group_size not in (32, 64, 128) or head_dim % self.group_size:
            raise OptionError(
                f"kv group size {self.group_size} is not 32, 64 or 128 or does not divide head_dim {head_dim}; "
                "choose one that does."
            )
