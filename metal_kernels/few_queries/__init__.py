"""Softmax attention of a few queries."""
