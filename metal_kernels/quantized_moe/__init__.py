"""Mixture of SwiGLU experts over MLX's packed weights, with the shared expert and the residual."""
