"""Adapters as mlx_lm.lora writes them, and the weights that a model with one of them has."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ring_mlx.model.kernel_weights import packed
from ring_mlx.model.moe import ExpertLinear
from tests.tiny import tokens

LINEAR, SOFTMAX = "model.layers.1", "model.layers.2"
PLACES = {
    "linear attention": [f"{LINEAR}.attention.{n}" for n in ("query_key_value", "g_proj", "dense")],
    "softmax attention": [f"{SOFTMAX}.attention.{n}" for n in ("query_key_value", "dense")],
    "dense block": [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")],
    "router": [f"{LINEAR}.mlp.gate.gate_proj"],
    "experts": [f"{LINEAR}.mlp.switch_mlp.{n}_proj" for n in ("gate", "up", "down")],
    "shared expert": [f"{SOFTMAX}.mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")],
    "ends": ["model.word_embeddings", "lm_head"],
}
EVERYWHERE = [path for paths in PLACES.values() for path in paths]
RANK, SCALE = 3, 1.5


def module_at(model, path):
    return dict(model.named_modules())[path]


def change_of(path, model, seed):
    """Random A and B, and what they add to the weight."""
    *count, rows, columns = packed(module_at(model, path)).dequantize().shape
    rng = np.random.default_rng(seed)
    if path == "model.word_embeddings":
        a, b = rng.normal(size=(rows, RANK)), rng.normal(size=(RANK, columns))
        change = a @ b
    elif count:
        a, b = rng.normal(size=(*count, RANK, columns)), rng.normal(size=(*count, rows, RANK))
        change = b @ a
    else:
        a, b = rng.normal(size=(columns, RANK)), rng.normal(size=(RANK, rows))
        change = (a @ b).T
    return a / columns**0.5, b / 4, change / columns**0.5 / 4


def save(folder, tensors, kind="lora", **changes):
    folder.mkdir(exist_ok=True)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.5, "keys": None}
    settings = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {n: mx.array(t) for n, t in tensors.items()})
    return folder


def adapter(folder, model, paths, kind="lora", seed=0):
    """An adapter's folder, and the weights that a model with it has."""
    tensors, merged = {}, {}
    for i, path in enumerate(paths):
        a, b, change = change_of(path, model, seed + i)
        weight = np.array(packed(module_at(model, path)).dequantize()).astype(np.float64) + SCALE * change
        tensors |= {f"{path}.lora_a": a.astype(np.float32), f"{path}.lora_b": b.astype(np.float32)}
        if kind == "dora":
            lengths = np.random.default_rng(i).uniform(0.5, 1.5, weight.shape[0])
            tensors[f"{path}.m"] = lengths.astype(np.float32)
            weight *= (lengths / np.linalg.norm(weight, axis=1))[:, None]
        merged[path] = mx.array(weight.astype(np.float32))
    return save(folder, tensors, kind), merged


def with_weights(model, merged):
    """The model with plain layers of these weights."""
    for path, weight in merged.items():
        old, (parent, _, name) = module_at(model, path), path.rpartition(".")
        if weight.ndim == 3:
            new = ExpertLinear(*weight.shape[:0:-1], weight.shape[0], bias=False)
        elif path == "model.word_embeddings":
            new = nn.Embedding(*weight.shape)
        else:
            new = nn.Linear(*weight.shape[::-1], bias=False)
        new.weight = weight
        if "bias" in old:
            new.bias = old.bias
        setattr(module_at(model, parent) if parent else model, name, new)
    model.eval()
    return model


def said(model):
    """Logits of a prompt in two steps, and of two tokens after it."""
    ids, cache = tokens(12, seed=3), model.make_cache()
    ends = (7, 10, 11, 12)
    logits = [model(ids[:, i:j], cache) for i, j in zip((0, *ends), ends, strict=False)]
    return mx.concatenate(logits, axis=1)
