"""Affine quantization: the scale and bias of each group with the least squared error."""
