"""Which format a source's tensors are in: one table, from their suffixes to the class that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ring_mlx.checkpoint import weights
from ring_mlx.convert.grids import GPTQ, Compressed
from ring_mlx.convert.matrices import FP8, Matrix, MLXPacked, Parameter, Parts, Plain, Stack
from ring_mlx.errors import WeightsError

# The first whose suffixes a parameter has reads it. A new format is a class and a row, and its suffixes below.
FORMATS: tuple[tuple[frozenset[str], Callable[[Parts, Parameter], Matrix]], ...] = (
    (frozenset(["weight_packed"]), Compressed),
    (frozenset(["qweight", "qzeros", "scales"]), GPTQ),
    (frozenset(["weight", "weight_scale_inv"]), FP8),
    (frozenset(["weight", "weight_scale"]), FP8),
    (frozenset(["weight", "scales"]), MLXPacked),
)
# Suffixes of the tensors that together make a parameter called weight.
WEIGHT_SUFFIXES = frozenset().union(
    *(suffixes for suffixes, _ in FORMATS), ["biases", "global_scale", "g_idx", "weight_zero_point", "weight_g_idx"]
)
IGNORED_SUFFIXES = frozenset(["weight_shape", "input_scale", "k_scale", "v_scale"])


def matrix(name: str, parts: Mapping[str, Any], cols: int, raw: Mapping[str, Any], num_experts: int) -> Matrix:
    """The matrix of a parameter; a WeightsError if its format is unknown, or it is damaged or not whole.

    ``parts`` are its tensors by suffix, those of a stack in the Hugging Face form by expert; ``cols`` the columns that
    the model expects, 0 if it has no such parameter; ``raw`` is config.json.
    """
    of = Parameter(name.removesuffix(".weight"), cols, raw)
    if not any(isinstance(entry, dict) for entry in parts.values()):
        return _one(name, parts, of)
    stacks = {
        suffix: weights.in_order(
            f"{name.removesuffix('weight')}{suffix}", experts if isinstance(experts, dict) else {}, num_experts
        )
        for suffix, experts in parts.items()
    }
    return Stack([_one(name, {s: experts[e] for s, experts in stacks.items()}, of) for e in range(num_experts)])


def _one(name: str, parts: Parts, of: Parameter) -> Matrix:
    for suffixes, read in FORMATS:
        if suffixes <= set(parts):
            return read(parts, of)
    if len(parts) == 1 and not set(parts) & (WEIGHT_SUFFIXES - {"weight"}):
        return Plain(parts, of)
    raise WeightsError(
        f"{name} comes as {', '.join(sorted(parts))}, which is no known format; use another form of the checkpoint."
    )
