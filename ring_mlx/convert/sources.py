"""A source checkpoint, local or on the hub, as one matrix for each parameter of the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.checkpoint.tensor_files import NUMPY_DTYPES
from ring_mlx.convert import remote
from ring_mlx.convert.matrices import GPTQ, BlockFP8, Compressed, Matrix, MLXPacked, Parts, Plain, Stack
from ring_mlx.convert.settings import Setting
from ring_mlx.errors import WeightsError
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.model import Model

# Suffixes of the tensors that together make a parameter called weight.
WEIGHT_SUFFIXES = frozenset(
    [
        "weight",
        "scales",
        "biases",
        "weight_scale_inv",
        "weight_scale",
        "qweight",
        "qzeros",
        "g_idx",
        "weight_packed",
        "weight_zero_point",
        "weight_g_idx",
    ]
)
IGNORED_SUFFIXES = frozenset(["weight_shape", "input_scale", "k_scale", "v_scale", "global_scale"])


@dataclass(frozen=True)
class Source:
    """What is to be converted.

    Args:
        name: For people: owner/name, or the folder's name.
        folder: Its small files; the shards too, unless ``repo`` is given.
        config: Checked.
        raw: config.json.
        tensors: Every tensor, by name.
        repo: (owner/name, commit) if the shards are still on the hub.
        commit: Of a repository, wherever its shards are.
    """

    name: str
    folder: Path
    config: RingConfig
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    repo: tuple[str, str | None] | None = None
    commit: str | None = None


def open_source(path_or_repo: str | os.PathLike[str], revision: str | None = None, remote_only: bool = False) -> Source:
    """Find a source and read its headers.

    Args:
        path_or_repo: A folder, or owner/name on the hub.
        revision: Of a repository.
        remote_only: Leave the shards of a repository on the hub; only config, tokenizer and headers are fetched, all
            of the commit that the revision means now.

    Raises:
        HubError, ConfigError, WeightsError: If it cannot be had, read or understood.
    """
    name = os.fspath(path_or_repo)
    if remote_only and remote.is_repo(name):
        folder = remote.fetch_small_files(name, revision)
        config, raw = read_config(folder)
        found = _checked(remote.tensors(name, folder.name))
        return Source(name, folder, config, raw, found, (name, folder.name), folder.name)
    folder = resolve_model(path_or_repo, revision)
    config, raw = read_config(folder)
    commit = folder.name if remote.is_repo(name) else None
    label = name if commit else folder.resolve().name
    return Source(label, folder, config, raw, _checked(read_tensors(folder)), commit=commit)


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for t in tensors.values():
        if t.dtype not in NUMPY_DTYPES:
            raise WeightsError(f"{t.name} has dtype {t.dtype}, which cannot be converted; use another checkpoint.")
    return tensors


def identity(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What tells one source from another without reading it: data bytes and a hash of the header of every shard."""
    by_shard: dict[str, list[list[Any]]] = {}
    for t in tensors.values():
        by_shard.setdefault(t.file.name, []).append([t.name, t.dtype, list(t.shape), t.start, t.end])
    return {
        shard: {
            "bytes": max(entry[-1] for entry in entries),
            "header_sha256": hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(),
        }
        for shard, entries in sorted(by_shard.items())
    }


def matrices(source: Source) -> dict[str, Matrix]:
    """The source's matrix of every parameter of the model, under the model's names.

    Raises:
        WeightsError: If parameters are missing, unknown or of another shape, or a format is not supported or not
            understood.
    """
    with _odd_values(source):
        return _matrices(source)


def _matrices(source: Source) -> dict[str, Matrix]:
    grouped: dict[str, dict[str, Any]] = {}
    for name, entry in weights.canonical(source.tensors, source.config).items():
        base, _, suffix = _router_name(name).rpartition(".")
        if suffix in IGNORED_SUFFIXES:
            continue
        parameter = f"{base}.weight" if suffix in WEIGHT_SUFFIXES else f"{base}.{suffix}"
        grouped.setdefault(parameter, {})[suffix] = entry
    shapes = parameter_shapes(source.config)
    found = {}
    for name, parts in grouped.items():
        cols = shapes[name][-1] if name in shapes else 0
        found[name] = _matrix(name, parts, source, cols)
    wanted = {name: as_matrix(shape) for name, shape in shapes.items()}
    weights.check_shapes({name: matrix.shape for name, matrix in found.items()}, wanted, source.name)
    return found


def parameter_shapes(config: RingConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model; nothing is allocated."""
    return {name: tuple(value.shape) for name, value in tree_flatten(Model(config).parameters())}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter: all axes but the last are rows, a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def source_dtype(source: Source) -> mx.Dtype:
    """The dtype that the source names, else the commonest of its float tensors.

    Raises:
        WeightsError: If config.json names something that is no name.
    """
    with _odd_values(source):
        return weights.file_dtype(source.raw, source.tensors)


@contextmanager
def _odd_values(source: Source) -> Iterator[None]:
    """Turn what a value of another type than its reader expects leads to into one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        raise WeightsError(
            f"the quantisation or dtype in {source.name}'s config.json cannot be understood ({type(e).__name__}: {e}); "
            "correct it, or download the checkpoint again."
        ) from None


def _router_name(name: str) -> str:
    base, _, suffix = name.rpartition(".")
    return f"{base}.gate_proj.{suffix}" if base.endswith(".mlp.gate") and suffix in WEIGHT_SUFFIXES else name


def _matrix(name: str, parts: Mapping[str, Any], source: Source, cols: int) -> Matrix:
    if not any(isinstance(entry, dict) for entry in parts.values()):
        return _one(name, parts, source, cols)
    count = source.config.num_experts
    stacks = {
        suffix: weights.in_order(
            f"{name.removesuffix('weight')}{suffix}", experts if isinstance(experts, dict) else {}, count
        )
        for suffix, experts in parts.items()
    }
    each = [{suffix: experts[e] for suffix, experts in stacks.items()} for e in range(count)]
    return Stack([_one(name, p, source, cols) for p in each])


def _one(name: str, parts: Parts, source: Source, cols: int) -> Matrix:
    kinds = set(parts)
    foreign = source.raw.get("quantization_config") or {}
    if "weight_packed" in kinds:
        return Compressed(parts, _compressed_bits(foreign))
    if {"qweight", "qzeros", "scales"} <= kinds:
        if foreign.get("quant_method") != "gptq":
            raise WeightsError(
                f"quantization method {foreign.get('quant_method')!r} is not supported; use GPTQ, compressed-tensors, "
                "FP8 or float weights."
            )
        return GPTQ(parts, foreign)
    for scale in ("weight_scale_inv", "weight_scale"):
        if scale in kinds and "weight" in kinds:
            return BlockFP8(parts, scale, _block(parts, scale, foreign))
    if {"weight", "scales"} <= kinds:
        return MLXPacked(parts, _mlx_setting(name.removesuffix(".weight"), parts, source, cols))
    if len(kinds) == 1 and not kinds & (WEIGHT_SUFFIXES - {"weight"}):
        return Plain(parts)
    raise WeightsError(
        f"{name} comes as {', '.join(sorted(kinds))}, which is no known format; use another form of the checkpoint."
    )


def _compressed_bits(config: Mapping[str, Any]) -> int:
    if config.get("format") not in (None, "pack-quantized"):
        raise WeightsError(
            f"compressed-tensors format {config.get('format')!r} is not supported, only 'pack-quantized'; use another "
            "form of the checkpoint."
        )
    bits = {int((g.get("weights") or {}).get("num_bits", 4)) for g in (config.get("config_groups") or {}).values()}
    if len(bits) > 1:
        raise WeightsError(
            f"compressed-tensors with {' and '.join(map(str, sorted(bits)))} bits in one checkpoint is not supported; "
            "use another form."
        )
    return bits.pop() if bits else 4


def _block(parts: Parts, scale: str, config: Mapping[str, Any]) -> tuple[int, int]:
    (rows, cols), shape = parts["weight"].matrix, parts[scale].shape
    if scale == "weight_scale_inv":
        block = config.get("weight_block_size") or (128, 128)
        return int(block[0]), int(block[1])
    # One scale for the matrix, or one for each row.
    return (1, cols) if shape and shape[0] == rows else (rows, cols)


def _mlx_setting(path: str, parts: Parts, source: Source, cols: int) -> Setting:
    named = (source.raw.get("quantization") or {}).get(path)
    if isinstance(named, Mapping):
        return Setting(int(named["group_size"]), int(named["bits"]), str(named.get("mode", "affine")))
    # As the loader does: what config.json says in general may not hold for this module.
    group, bits = cols // max(1, parts["scales"].matrix[1]), parts["weight"].matrix[1] * 32 // max(1, cols)
    if "biases" in parts:
        mode = "affine"
    else:
        mode = {(16, 4): "nvfp4", (32, 4): "mxfp4", (32, 8): "mxfp8"}.get((group, bits), "")
    if not mode or bits == 0:
        raise WeightsError(f"{parts['weight'].name} has a quantisation that cannot be told; convert the original.")
    return Setting(group, bits, mode)
