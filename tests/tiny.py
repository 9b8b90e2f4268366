"""Small random checkpoints on disk, in either form; shapes differ on every axis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.model.config import RingConfig
from ring_mlx.model.model import Model

GOLDENS = Path(__file__).parent / "goldens"

CONFIG: dict[str, Any] = {
    "decay_layer_offset": 0,  # so that a conversion need not look for it
    "model_type": "bailing_moe_linear",
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_group_size": 3,
    "group_norm_size": 3,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "first_k_dense_replace": 1,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "vocab_size": 70,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


# Sizes that divide by 32, so that every layer can be quantized in groups of so many and read by the kernels.
PACKABLE = {
    "head_dim": 32,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 96,
}


def config(**changes: Any) -> dict[str, Any]:
    """The small configuration with changes; a value of ``...`` removes the key."""
    merged = CONFIG | changes
    return {k: v for k, v in merged.items() if v is not ...}


def softmax_config(**changes: Any) -> dict[str, Any]:
    """The softmax sibling of the small configuration."""
    return config(model_type="bailing_moe_v2", layer_group_size=..., group_norm_size=..., **changes)


def make_model(seed: int = 0, exact: bool = False, **changes: Any) -> Model:
    """A model with random weights whose norms and biases are not trivial."""
    mx.random.seed(seed)
    model = Model(RingConfig.from_dict(config(**changes)), exact=exact)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if "norm" in name:
            value = 1 + 0.2 * mx.random.normal(value.shape)
        elif name.endswith("expert_bias"):
            value = 0.2 * mx.random.normal(value.shape)
        elif value.ndim > 1:
            value = mx.random.normal(value.shape) / value.shape[-1] ** 0.5
        weights.append((name, value))
    model.load_weights(weights)
    mx.eval(model.parameters())
    model.eval()
    return model


def save_hf(folder: Path, raw: dict[str, Any], seed: int = 0, shards: int = 1) -> Model:
    """Write a checkpoint in the Hugging Face form, one tensor an expert; returns the model it holds."""
    raw = dict(raw)
    model = make_model(seed, **{k: raw.get(k, ...) for k in CONFIG | raw})
    tensors: dict[str, mx.array] = {}
    for name, value in tree_flatten(model.parameters()):
        if ".switch_mlp." in name:
            for e in range(value.shape[0]):
                tensors[name.replace("switch_mlp.", f"experts.{e}.")] = value[e]
        else:
            tensors[name.replace(".mlp.gate.gate_proj.", ".mlp.gate.")] = value
    write(folder, raw, tensors, shards)
    return model


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, mx.array], shards: int = 1) -> None:
    """Write config.json and tensors, with an index if there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        mx.save_safetensors(str(folder / file), part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tokens(T: int, vocab: int = 70, seed: int = 1, B: int = 1) -> mx.array:
    """Random ids [B, T]."""
    return mx.random.randint(0, vocab, (B, T), key=mx.random.key(seed))
