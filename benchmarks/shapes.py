"""Models at true shapes with random quantised weights, so that speed can be measured without a download."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ring_mlx.config import RingConfig
from ring_mlx.model import Model

COMMON = {
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
SHAPES = {"mini": MINI, "flash": FLASH, "tiny": TINY, "golden": GOLDEN}


def random_model(shape: str, bits: int | None = 4, group_size: int = 64, exact: bool = False) -> Model:
    """A model of a known shape with random weights, bfloat16 where not quantised (float32 for "tiny" and "golden").

    Args:
        shape: "mini", "flash", "tiny" or "golden".
        bits: Of all matrices but the router; None leaves them as they are.
        group_size: Of the quantisation.
        exact: As for `Model`.
    """
    model = Model(RingConfig.from_dict(SHAPES[shape]), exact=exact)
    dtype = mx.float32 if shape in ("tiny", "golden") else mx.bfloat16
    for module in [*model.layers, model.model, model]:
        own = module if isinstance(module, nn.Module) else model
        if bits is not None:
            nn.quantize(
                own,
                group_size,
                bits,
                class_predicate=lambda path, m: hasattr(m, "to_quantized") and not path.endswith("gate.gate_proj"),
            )
        own.update(tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, own.parameters()))
        mx.eval(own.parameters())
        mx.clear_cache()
    for layer in model.layers:
        if "gate" in layer.mlp:
            layer.mlp.gate.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
