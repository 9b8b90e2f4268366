"""Checkpoints in the packed forms of other makers, made from known weights for the tests of their readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ring_mlx.convert.grids import pack
from tests.tiny import config, make_model

ROUTER_AND_NORMS = ("mlp.gate.", "norm", "expert_bias", "word_embeddings", "lm_head")
SHAPES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "group_norm_size": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "torch_dtype": "float32",
}


def shape(**changes: Any) -> dict[str, Any]:
    """A configuration whose rows divide into groups of 64 and blocks."""
    return config(**SHAPES | changes)


def float_weights(raw: dict[str, Any]) -> dict[str, mx.array]:
    """Random weights under Hugging Face names, one tensor an expert."""
    tensors = {}
    for name, value in tree_flatten(make_model(3, **raw).parameters()):
        if ".switch_mlp." in name:
            for e in range(value.shape[0]):
                tensors[name.replace("switch_mlp.", f"experts.{e}.")] = value[e]
        else:
            tensors[name.replace(".mlp.gate.gate_proj.", ".mlp.gate.")] = value
    return tensors


def is_packed(name: str) -> bool:
    """Whether makers quantize this tensor."""
    return name.endswith(".weight") and not any(part in name for part in ROUTER_AND_NORMS)


def words(codes: np.ndarray, bits: int) -> mx.array:
    """Codes [n, cols] packed into int32 along the columns, lowest first."""
    return pack(mx.array(codes.astype(np.uint32)), bits).view(mx.int32)


def gptq(w: mx.array, group: int, g_idx: np.ndarray | None, v2: bool = False) -> tuple[dict[str, mx.array], np.ndarray]:
    """The tensors of one GPTQ matrix [out, in] with asymmetric zero points, and the weights that they mean."""
    x = np.array(w, dtype=np.float64)
    out, cols = x.shape
    groups = np.arange(cols) // group if g_idx is None else g_idx
    scales, zeros = np.zeros((cols // group, out)), np.zeros((cols // group, out), dtype=np.int64)
    for g in range(cols // group):
        part = x[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[g] = ((high - low) / 15).astype(np.float16)
        zeros[g] = np.clip(np.round(-low / scales[g]), 0, 15)
    codes = np.clip(np.round(x.T / scales[groups] + zeros[groups]), 0, 15)
    meant = (scales[groups] * (codes - zeros[groups])).T
    parts = {
        "qweight": mx.contiguous(words(codes.T, 4).T),
        "qzeros": words((zeros - (0 if v2 else 1)) % 16, 4),
        "scales": mx.array(scales.astype(np.float16)),
        "g_idx": mx.array(groups.astype(np.int32)),
    }
    return parts, meant


def compressed(
    w: mx.array, group: int, symmetric: bool, g_idx: np.ndarray | None = None
) -> tuple[dict[str, mx.array], np.ndarray]:
    """The tensors of one compressed-tensors W4A16 matrix, and the weights that they mean."""
    x = np.array(w, dtype=np.float64)
    out, cols = x.shape
    groups = np.arange(cols) // group if g_idx is None else g_idx
    scales, zeros = np.zeros((out, cols // group)), np.zeros((out, cols // group), dtype=np.int64)
    for g in range(cols // group):
        part = x[:, groups == g]
        if symmetric:
            scales[:, g] = (np.abs(part).max(1) / 7.5).astype(np.float32)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, g] = ((high - low) / 15).astype(np.float32)
            zeros[:, g] = np.clip(np.round(-8 - low / scales[:, g]), -8, 7)
    codes = np.clip(np.round(x / scales[:, groups] + zeros[:, groups]), -8, 7)
    parts = {
        "weight_packed": words(codes + 8, 4),
        "weight_scale": mx.array(scales.astype(np.float32)),
        "weight_shape": mx.array(np.array([out, cols], dtype=np.int64)),
    }
    if not symmetric:
        parts["weight_zero_point"] = mx.contiguous(words((zeros + 8).T, 4).T)
    if g_idx is not None:
        parts["weight_g_idx"] = mx.array(g_idx.astype(np.int32))
    return parts, scales[:, groups] * (codes - zeros[:, groups])


def fp8(w: mx.array, block: int) -> tuple[dict[str, mx.array], np.ndarray]:
    """The tensors of one block-FP8 matrix, and the weights that they mean; codes are uint8 until `write`."""
    x = np.array(w, dtype=np.float32)
    rows, cols = (-(-n // block) for n in x.shape)
    scales = np.zeros((rows, cols), dtype=np.float32)
    for i in range(rows):
        for j in range(cols):
            scales[i, j] = np.abs(x[i * block : (i + 1) * block, j * block : (j + 1) * block]).max() / 448
    spread = np.kron(scales, np.ones((block, block), dtype=np.float32))[: x.shape[0], : x.shape[1]]
    codes = mx.to_fp8(mx.array(x / spread))
    meant = np.array(mx.from_fp8(codes, mx.float32)) * spread
    return {"weight": codes, "weight_scale_inv": mx.array(scales)}, meant


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, mx.array]) -> None:
    """Write config.json and the tensors; uint8 ones are labelled F8_E4M3, as scales F8_E8M0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), tensors)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, info in header.items():
        if info and info.get("dtype") == "U8":
            info["dtype"] = "F8_E8M0" if name.endswith("scale") else "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
