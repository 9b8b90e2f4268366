"""The terminal chat: a Textual front end that uses only the public names of ring_mlx, and never MLX."""
