"""Training of Ring-nano, the toy model of ring-mlx, from generated data; not part of the installed package."""
