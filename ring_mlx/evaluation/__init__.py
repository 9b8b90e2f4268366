"""Measures the quality of a model.

Modules, each using those above it:

    answers     a suite's questions answered         scoring     logits of given tokens, in steps and windows
    perplexity  nats a token of a text               divergence  KL of one model from another on the same tokens
    needles     facts and filler                     sharing     prompts read with their common starts once
    recall      facts asked for after long texts     heat_map    the grid as a picture
"""

from ring_mlx.evaluation.answers import Result, accuracy_by_task, complete, evaluate

__all__ = ["Result", "accuracy_by_task", "complete", "evaluate"]
