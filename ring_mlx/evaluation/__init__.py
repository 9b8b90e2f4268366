"""Measures the quality of a model.

Modules, each using those above it:

    answers     a suite's questions answered         perplexity  logits and nats of given tokens, in windows
    divergence  KL of one model from another         sharing     prompts read with their common starts once
    needles     facts and filler                     recall      facts asked for after long texts
    heat_map    the grid as a picture
"""

from ring_mlx.evaluation.answers import Result, accuracy_by_task, complete, evaluate

__all__ = ["Result", "accuracy_by_task", "complete", "evaluate"]
