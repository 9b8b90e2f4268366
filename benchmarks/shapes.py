"""Models at true shapes with random weights; they live in `ring_mlx.bench`, which the ``bench`` command uses too."""

from __future__ import annotations

from ring_mlx.bench.random_weights import random_model
from ring_mlx.bench.shapes import COMMON, FLASH, GOLDEN, MINI, SHAPES, TINY

__all__ = ["COMMON", "FLASH", "GOLDEN", "MINI", "SHAPES", "TINY", "random_model"]
