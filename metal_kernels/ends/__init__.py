"""What a step of a few tokens begins and ends with: rows of the embedding, and the largest logits."""
