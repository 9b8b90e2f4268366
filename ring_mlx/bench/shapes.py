"""The shapes of known models as config.json holds them; numbers only.

mini and flash are Ring-mini-linear-2.0 and Ring-flash-linear-2.0; their softmax siblings differ only in that every
layer is softmax attention. tiny and golden are for tests and the CPU.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "model_type": "bailing_moe_linear",
    "head_dim": 128,
    "group_norm_size": 4,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "rope_theta": 1000000,
    "max_position_embeddings": 131072,
    "vocab_size": 157184,
}
MINI = COMMON | {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 20,
    "layer_group_size": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
FLASH = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "layer_group_size": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
TINY = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 10,
    "layer_group_size": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "vocab_size": 128,
}
GOLDEN = TINY | {"head_dim": 16}
LINEAR_ONLY = ("layer_group_size", "group_norm_size")


def softmax_sibling(shape: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in shape.items() if k not in LINEAR_ONLY}
    return kept | {"model_type": "bailing_moe_v2", "rope_theta": 600000}


SHAPES = {
    "mini": MINI,
    "flash": FLASH,
    "mini-softmax": softmax_sibling(MINI),
    "flash-softmax": softmax_sibling(FLASH),
    "tiny": TINY,
    "golden": GOLDEN,
}


def cut(shape: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The shape with fewer layers; a group is never longer than the model, so that both kinds of layer remain."""
    if layers is None:
        return shape
    group = shape.get("layer_group_size")
    return shape | {"num_hidden_layers": layers} | ({"layer_group_size": min(group, layers)} if group else {})
