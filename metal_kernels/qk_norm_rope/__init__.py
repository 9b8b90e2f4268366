"""QK-norm, rotary embedding and split of the fused projection."""
