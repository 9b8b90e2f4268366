"""Which format a source's tensors are in: one table, from their suffixes to the class that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.tensor_files import NUMPY_DTYPES
from ring_mlx.convert.integers import GPTQ, Compressed
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
# Of activations and caches, which the weights do not depend on, or said by the shapes too.
IGNORED_SUFFIXES = frozenset(
    f"{what}_{kind}"
    for what in ("input", "output", "activation", "q", "k", "v", "prob")
    for kind in ("scale", "scale_ub", "zero_point", "global_scale", "g_idx")
) | {"weight_shape"}


def matrix(name: str, parts: Mapping[str, Any], cols: int, raw: Mapping[str, Any], num_experts: int) -> Matrix:
    """The matrix of a parameter; a WeightsError if its format is unknown, or it is damaged or not whole.

    ``parts`` are its tensors by suffix, those of a stack in the Hugging Face form by expert, each in a format of its
    own; ``cols`` the columns that the model expects, 0 if it has no such parameter; ``raw`` is config.json.
    """
    of = Parameter(name.removesuffix(".weight"), cols, raw)
    if not any(isinstance(entry, dict) for entry in parts.values()):
        return _one(name, parts, of)
    by_expert: dict[int, dict[str, Any]] = {}
    for suffix, experts in parts.items():
        for e, tensor in experts.items() if isinstance(experts, dict) else ():
            by_expert.setdefault(e, {})[suffix] = tensor
    weights.check_numbers(name, by_expert, num_experts)
    if len({frozenset(own) for own in by_expert.values()}) == 1:
        _check_alike(name, by_expert)
    found = [_one(name, by_expert[e], of) for e in range(num_experts)]
    if len({m.shape for m in found}) > 1:
        raise weights.differing(name, {str(m.shape) for m in found})
    return Stack(found)


def _check_alike(name: str, by_expert: Mapping[int, Parts]) -> None:
    """Raises a WeightsError if experts of one format differ in more than the type of their floats."""
    for suffix in by_expert[0]:
        tensors = [own[suffix] for own in by_expert.values()]
        kinds = {str((t.shape, "float" if t.dtype in weights.FLOATS else t.dtype)) for t in tensors}
        if len(kinds) > 1:
            raise weights.differing(f"{name.removesuffix('weight')}{suffix}", kinds)


def _one(name: str, parts: Parts, of: Parameter) -> Matrix:
    for t in parts.values():
        if t.dtype not in NUMPY_DTYPES:
            raise WeightsError(f"{t.name} has dtype {t.dtype}, which cannot be converted; use another checkpoint.")
    for suffixes, read in FORMATS:
        if suffixes <= set(parts):
            return read(parts, of)
    if len(parts) == 1 and not set(parts) & (WEIGHT_SUFFIXES - {"weight"}):
        return Plain(parts, of)
    raise WeightsError(
        f"{name} comes as {', '.join(sorted(parts))}, which is no known format; use another form of the checkpoint."
    )
