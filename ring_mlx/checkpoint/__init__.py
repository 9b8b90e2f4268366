"""Checkpoints on disk or on the hub: their files, weights and tokenizer, read with checks."""
