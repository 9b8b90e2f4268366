"""Norm and product of a few tokens with a matrix of very many rows."""
