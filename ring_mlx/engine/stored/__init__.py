"""Snapshots on disk as files: which there are, which may stay within a budget, which go. Imports no MLX.

manifest  the small file that makes blobs a snapshot      keeping  which stay within a budget
folder    one model's snapshots                           stores   those of all models
"""
