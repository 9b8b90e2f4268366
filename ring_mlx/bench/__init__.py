"""``ring-mlx bench``: speed, memory and their physical limits, of ours and of stock mlx-lm."""
