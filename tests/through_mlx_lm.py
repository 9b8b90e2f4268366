"""What mlx-lm loads with our plug-in, and what it says; the tests of its commands, batches and models share it."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import utils
from mlx_lm.generate import generate_step


def to_float32(model):
    floats = tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    model.update(floats)
    return model


def build(folder):
    """mlx-lm's own loader."""
    return to_float32(utils.load_model(folder)[0])


def said_alone(model, ids, count):
    return [int(t) for t, _ in generate_step(mx.array(ids), model, max_tokens=count)]


def until_stop(tokenizer, said):
    ends = [i for i, t in enumerate(said) if t in tokenizer.eos_token_ids]
    return tokenizer.decode(said[: ends[0] if ends else None])
