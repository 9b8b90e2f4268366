"""Which rows or columns of each tensor belong to a rank.

Matrices that widen (queries, keys and values, gates, up) are cut by rows; those that narrow again (dense, down) by
columns, so that one sum over the ranks ends a block. A quantised matrix is cut by columns between groups; an affine
group may be taken as two or four smaller ones with the same scale and bias, which changes no value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.model.config import RingConfig

Entry = Tensor | dict[int, Tensor]
AFFINE_GROUPS = (64, 32)

_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)\.([^.]+)$")
_WIDENS = re.compile(r"^mlp\.(switch_mlp\.|shared_experts\.|)(gate|up)_proj$")
_NARROWS = re.compile(r"^mlp\.(switch_mlp\.|shared_experts\.|)down_proj$")


@dataclass(frozen=True)
class Cut:
    """A part of a tensor.

    Attributes:
        axis: -2 for rows of each matrix, -1 for elements of each row.
        ranges: Start and stop along it, in order.
        repeat: How often each element of a row is repeated before it is cut.
        is_zero: Zeros of that shape instead: a bias that another rank adds.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]
    repeat: int = 1
    is_zero: bool = False


def plan_cuts(
    entries: Mapping[str, Entry], config: RingConfig, rank: int, size: int
) -> tuple[dict[str, Cut], dict[str, dict[str, object]]]:
    """The cuts of all tensors that are not whole on every rank.

    Args:
        entries: From `ring_mlx.checkpoint.weights.canonical`.
        config: Of the whole model.
        rank, size: Which part of how many.

    Returns:
        Cuts by parameter name, and the new quantisation of modules whose groups become smaller.

    Raises:
        DistributedError: If a cut falls into a group that cannot be made smaller.
    """
    cuts, regrouped = {}, {}
    for name in entries:
        found = _NAME.match(name)
        if found is None:
            continue
        layer, module, kind = int(found[1]), found[2], found[3]
        rows = _rows(module, layer, config, rank, size)
        width = _columns(module, config)
        if rows is not None:
            cuts[name] = Cut(-1 if kind == "bias" or module == "attention.g_norm" else -2, rows)
        elif width is not None and kind == "bias":
            cuts[name] = Cut(-1, ((0, _shape(entries[name])[-1]),), is_zero=rank > 0)
        elif width is not None:
            path = name.rpartition(".")[0]
            bits, old, new = _packing(path, entries, width, size)
            cuts[name] = _column_cut(kind, width // size, rank, bits, old, new)
            if new != old:
                regrouped[path] = {"group_size": new, "bits": bits, "mode": "affine"}
    return cuts, regrouped


def _rows(module: str, layer: int, c: RingConfig, rank: int, size: int) -> tuple[tuple[int, int], ...] | None:
    heads, D = c.num_attention_heads, c.head_dim
    if module in ("attention.g_proj", "attention.g_norm"):
        return (_share(heads * D, rank, size),)
    if module == "attention.query_key_value":
        kv = heads if c.is_linear(layer) else c.num_key_value_heads
        own = (rank * kv // size * D, (rank * kv // size + max(1, kv // size)) * D)
        values = (heads + kv) * D
        q = _share(heads * D, rank, size)
        return q, (heads * D + own[0], heads * D + own[1]), (values + own[0], values + own[1])
    found = _WIDENS.match(module)
    return (_share(_inner(found[1], c), rank, size),) if found else None


def _columns(module: str, c: RingConfig) -> int | None:
    """The true columns of a matrix that is cut by them."""
    if module == "attention.dense":
        return c.num_attention_heads * c.head_dim
    found = _NARROWS.match(module)
    return _inner(found[1], c) if found else None


def _inner(where: str, c: RingConfig) -> int:
    if where == "switch_mlp.":
        return c.moe_intermediate_size
    return c.num_shared_experts * c.moe_shared_expert_intermediate_size if where else c.intermediate_size


def _packing(path: str, entries: Mapping[str, Entry], width: int, size: int) -> tuple[int, int, int]:
    """Bits of a value, and the size of a group now and after the cut; zeros where nothing is packed."""
    scales = entries.get(f"{path}.scales")
    if scales is None:
        return 0, 0, 0
    bits = _shape(entries[f"{path}.weight"])[-1] * 32 // width
    old, part = width // _shape(scales)[-1], width // size
    fits = [g for g in (old, *AFFINE_GROUPS) if part % g == 0 and old % g == 0]
    if not fits or (fits[0] != old and f"{path}.biases" not in entries):
        raise DistributedError(
            f"{path} has {width} columns in groups of {old}, which cannot be cut into {size} parts of {part}; use "
            "fewer ranks, --distributed pipeline, or a conversion with groups of 32."
        )
    return bits, old, fits[0]


def _column_cut(kind: str, part: int, rank: int, bits: int, old: int, new: int) -> Cut:
    if not old:
        return Cut(-1, ((rank * part, (rank + 1) * part),))
    if kind == "weight":
        return Cut(-1, ((rank * part * bits // 32, (rank + 1) * part * bits // 32),))
    return Cut(-1, ((rank * part // new, (rank + 1) * part // new),), repeat=old // new)


def _share(width: int, rank: int, size: int) -> tuple[int, int]:
    return rank * width // size, (rank + 1) * width // size


def _shape(entry: Entry) -> tuple[int, ...]:
    return (next(iter(entry.values())) if isinstance(entry, dict) else entry).shape
