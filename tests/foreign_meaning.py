"""What quantized tensors of other makers mean, in float64 by their published layouts; uses nothing of the package.

``parts`` are a matrix's tensors by suffix, as (dtype of the header, numpy array); float8 and bfloat16 are integers of
their bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Parts = dict[str, tuple[str, np.ndarray]]
KINDS = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


def read(file: Path) -> tuple[Parts, dict[str, Any]]:
    """The tensors of a file of one matrix by suffix, and its metadata."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    parts = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        array = np.frombuffer(data[8 + size + start : 8 + size + end], KINDS[info["dtype"]]).reshape(info["shape"])
        parts[name.rpartition(".")[2]] = info["dtype"], array
    return parts, metadata


def floats(part: tuple[str, np.ndarray]) -> np.ndarray:
    dtype, array = part
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in ("F8_E8M0", "U8"):
        return 2.0 ** (array.astype(np.float64) - 127)
    if dtype == "F8_E4M3":
        sign, exponent, mantissa = array >> 7, (array >> 3) & 15, (array & 7).astype(np.float64)
        normal = 2.0 ** (exponent.astype(np.float64) - 7) * (1 + mantissa / 8)
        return np.where(sign, -1.0, 1.0) * np.where(exponent, normal, 2.0**-6 * mantissa / 8)
    return array.astype(np.float64)


def codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first codes of each row of words, which are one stream of bits from the lowest."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (stream * (1 << np.arange(bits))).sum(-1)[:, :count]


def whole_codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same of words that each hold whole codes."""
    each = [codes(words[:, [i]], bits, 32 // bits) for i in range(words.shape[1])]
    return np.concatenate(each, axis=1)[:, :count]


def gptq(parts: Parts, quantization: dict[str, Any]) -> np.ndarray:
    bits = quantization["bits"]
    scales = floats(parts["scales"])
    cols = parts["qweight"][1].shape[0] * 32 // bits
    words = np.ascontiguousarray(parts["qzeros"][1])
    if quantization["checkpoint_format"] == "gptq" and bits != 3:
        words = words + np.array([sum(1 << i for i in range(0, 32, bits))], dtype=np.uint32).view(np.int32)
    zeros = codes(words, bits, scales.shape[1])
    if quantization["checkpoint_format"] == "gptq" and bits == 3:
        zeros = (zeros + 1) % 8
    groups = parts["g_idx"][1]
    return scales.T[:, groups] * (codes(parts["qweight"][1].T, bits, cols) - zeros.T[:, groups])


def compressed(parts: Parts, quantization: dict[str, Any]) -> np.ndarray:
    rows, cols = (int(n) for n in parts["weight_shape"][1])
    words, scales = parts["weight_packed"][1], floats(parts["weight_scale"])
    found = {g["weights"]["num_bits"] for g in quantization["config_groups"].values()}
    bits = next(b for b in found if -(-cols * b // 32) == words.shape[1])
    middle = 1 << (bits - 1)
    zeros = np.full(scales.shape, middle)
    if "weight_zero_point" in parts:
        zeros = codes(parts["weight_zero_point"][1].T, bits, rows).T
    groups = np.arange(cols) // (cols // scales.shape[1])
    if "weight_g_idx" in parts and parts["weight_g_idx"][1].min() >= 0:
        groups = parts["weight_g_idx"][1]
    return scales[:, groups] * (codes(words, bits, cols) - zeros[:, groups])


def fp8(parts: Parts, quantization: dict[str, Any]) -> np.ndarray:
    weight, scales = floats(parts["weight"]), floats(next(p for s, p in parts.items() if s.startswith("weight_scale")))
    if scales.size == 1:
        return weight * scales.reshape(1, 1)
    if scales.ndim == 1:
        scales = scales[:, None]
    groups = quantization.get("config_groups", {"": {"weights": {}}}).values()
    named = quantization.get("weight_block_size") or next(iter(groups))["weights"].get("block_structure")
    block = named or [weight.shape[0] // scales.shape[0], weight.shape[1] // scales.shape[1]]
    return weight * np.kron(scales, np.ones(block))[: weight.shape[0], : weight.shape[1]]


def meaning(parts: Parts, quantization: dict[str, Any]) -> np.ndarray:
    """The weights [out, in]."""
    if "qweight" in parts:
        return gptq(parts, quantization)
    return compressed(parts, quantization) if "weight_packed" in parts else fp8(parts, quantization)
