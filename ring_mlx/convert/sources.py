"""A source checkpoint, local or on the hub, as one matrix for each parameter of the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ring_mlx.checkpoint import weights
from ring_mlx.checkpoint.fingerprint import SAMPLE_BYTES
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert import remote
from ring_mlx.convert.formats import IGNORED_SUFFIXES, WEIGHT_SUFFIXES, matrix
from ring_mlx.convert.matrices import Matrix
from ring_mlx.errors import WeightsError
from ring_mlx.model import quantization
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.model import Model


@dataclass(frozen=True)
class Source:
    """A checkpoint to be converted.

    ``name`` is for people. ``repo`` is (owner/name, commit) if the shards are still on the hub; then ``folder`` holds
    only the small files. ``raw`` is config.json. ``commit`` is the repository's, None for a folder.
    """

    name: str
    folder: Path
    config: RingConfig
    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    repo: tuple[str, str | None] | None = None
    commit: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def open_source(path_or_repo: str | os.PathLike[str], revision: str | None = None, remote_only: bool = False) -> Source:
    """Find a source, a folder or owner/name on the hub, and read its headers.

    With ``remote_only`` only config, tokenizer and headers of a repository are fetched, all of the commit that the
    revision means now. Raises a RingError if it cannot be had, read or understood.
    """
    name = os.fspath(path_or_repo)
    if remote_only and remote.is_repo(name):
        folder = remote.fetch_small_files(name, revision)
        config, raw = read_config(folder)
        found = remote.tensors(name, folder.name)
        return Source(name, folder, config, raw, found, (name, folder.name), folder.name)
    folder = resolve_model(path_or_repo, revision)
    config, raw = read_config(folder)
    commit = folder.name if remote.is_repo(name) else None
    label = name if commit else folder.resolve().name
    return Source(label, folder, config, raw, read_tensors(folder), commit=commit)


def identity(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Data bytes and a hash of the header of every shard, which identify a source without reading it."""
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


def samples(source: Source) -> dict[str, str]:
    """A hash of 4 KiB from the middle of every tensor, by shard: other weights under the same header. None of a repository."""
    if source.repo is not None:
        return {}
    found = {file: hashlib.sha256() for file in sorted({t.file for t in source.tensors.values()})}
    with closing(TensorFiles()) as files:
        for t in sorted(source.tensors.values(), key=lambda t: (t.file, t.start)):
            found[t.file].update(files.sample(t, SAMPLE_BYTES))
    return {file.name: digest.hexdigest() for file, digest in found.items()}


def times(source: Source) -> dict[str, list[int]]:
    """Size and time of change of every shard of a folder that no commit identifies."""
    if source.commit is not None:
        return {}
    stats = {file.name: file.stat() for file in sorted({t.file for t in source.tensors.values()})}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def matrices(source: Source) -> dict[str, Matrix]:
    """The source's matrix of every parameter by the model's names; a WeightsError if one is missing or unsupported."""
    with _odd_values(source):
        grouped: dict[str, dict[str, Any]] = {}
        entries = weights.canonical(source.tensors, source.config)
        used = [t for e in entries.values() for t in (e.values() if isinstance(e, dict) else [e])]
        quantization.check_readable(source.raw, entries, any(t.dtype not in weights.FLOATS for t in used))
        for name, entry in entries.items():
            base, _, suffix = name.rpartition(".")
            if suffix not in IGNORED_SUFFIXES:
                parameter = f"{base}.weight" if suffix in WEIGHT_SUFFIXES else f"{base}.{suffix}"
                grouped.setdefault(parameter, {})[suffix] = entry
        shapes = {name: as_matrix(shape) for name, shape in parameter_shapes(source.config).items()}
        found = {
            name: matrix(name, parts, shapes.get(name, (0, 0))[1], source.raw, source.config.num_experts)
            for name, parts in grouped.items()
        }
        weights.check_shapes({name: m.shape for name, m in found.items()}, shapes, source.name)
        return found


def parameter_shapes(config: RingConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model, without memory for them."""
    return {name: tuple(value.shape) for name, value in tree_flatten(Model(config).parameters())}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (all axes but the last) and columns of a parameter; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def source_dtype(source: Source) -> mx.Dtype:
    with _odd_values(source):
        return weights.file_dtype(source.raw, source.tensors)


@contextmanager
def _odd_values(source: Source) -> Iterator[None]:
    """Turn the errors that values of an unexpected type lead to into one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        raise WeightsError(
            f"the quantization or dtype in {source.name}'s config.json cannot be understood ({type(e).__name__}: {e}); "
            "correct it, or download the checkpoint again."
        ) from None
