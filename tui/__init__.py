"""The terminal chat: a Textual front end that knows the public names of ring_mlx and nothing of MLX."""
