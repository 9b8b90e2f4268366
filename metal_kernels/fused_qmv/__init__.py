"""Products of a few tokens with packed matrices, between the operations around them."""
