"""Shards of a source checkpoint: their headers, and rows of their tensors.

Data is read at its offset into fresh memory: pages of a memory map would count as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ring_mlx.errors import WeightsError
from ring_mlx.safetensors_header import Entry, read_header
from ring_mlx.shards import find_shards
from ring_mlx.weights import Tensor, add_tensors

NUMPY_DTYPES: dict[str, Any] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
}


@dataclass(frozen=True)
class SourceTensor(Tensor):
    """A tensor of the source and where its data begins and ends, counted from the end of the header."""

    start: int
    end: int

    @property
    def matrix(self) -> tuple[int, int]:
        """All axes but the last as rows; a vector is one row."""
        cols = self.shape[-1] if self.shape else 1
        return (self.end - self.start) // max(1, cols * self.element_bytes), cols

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return int(np.dtype(NUMPY_DTYPES[self.dtype]).itemsize)


class SourceFiles:
    """Rows of tensors, from files that are fetched when first read and, if they were fetched, dropped after use.

    Args:
        fetch: Gives the local path of a shard; None where shards are local files.
        uses: How many outputs read each shard, by name.
    """

    def __init__(self, fetch: Callable[[str], Path] | None = None, uses: Mapping[str, int] | None = None) -> None:
        self._fetch = fetch
        self._left = Counter(uses or {})
        self._open: dict[Path, tuple[BinaryIO, int, Path]] = {}

    def read(self, tensor: SourceTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows ``start`` to ``stop`` of a tensor, [stop - start, cols]; float8 as uint8.

        Raises:
            WeightsError: If the tensor has fewer rows, or the file is too short or unreadable.
        """
        rows, cols = tensor.matrix
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise WeightsError(
                f"{tensor.name} {tensor.shape} has {rows} rows, but {start} to {stop} are needed; download the "
                "checkpoint again."
            )
        row_bytes = cols * tensor.element_bytes
        wanted = (stop - start) * row_bytes
        try:
            file, header = self._opened(tensor.file)
            file.seek(header + tensor.start + start * row_bytes)
            data = file.read(wanted)
        except OSError as e:
            raise WeightsError(f"{tensor.file} cannot be read ({e}); check the disk or download it again.") from None
        if len(data) != wanted:
            raise WeightsError(f"{tensor.file} ends within {tensor.name}; delete the file and download it again.")
        array = mx.array(np.frombuffer(data, NUMPY_DTYPES[tensor.dtype]).reshape(stop - start, cols))
        return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array

    def release(self, shards: Iterable[Path]) -> None:
        """Say that one output which reads these shards is done; what was fetched and is not needed again is removed."""
        for shard in shards:
            self._left[shard.name] -= 1
            if self._left[shard.name] == 0 and shard in self._open:
                file, _, path = self._open.pop(shard)
                file.close()
                if self._fetch is not None:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files."""
        for file, _, _ in self._open.values():
            file.close()
        self._open.clear()

    def _opened(self, shard: Path) -> tuple[BinaryIO, int]:
        if shard not in self._open:
            path = self._fetch(shard.name) if self._fetch is not None else shard
            opened = path.open("rb")
            self._open[shard] = opened, 8 + int.from_bytes(opened.read(8), "little"), path
        file, header, _ = self._open[shard]
        return file, header


def local_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of a checkpoint folder, from its headers, which are checked against the sizes of the files.

    Raises:
        WeightsError: If shards are missing, truncated or damaged, or a dtype is unknown.
    """
    tensors: dict[str, SourceTensor] = {}
    for shard in find_shards(folder):
        add_tensors(tensors, tensors_of(shard, read_header(shard).tensors), shard)
    return tensors


def tensors_of(shard: Path, header: Mapping[str, Entry]) -> dict[str, SourceTensor]:
    """The tensors of one header.

    Raises:
        WeightsError: If a dtype is unknown.
    """
    tensors = {}
    for name, e in header.items():
        if e.dtype not in NUMPY_DTYPES:
            raise WeightsError(f"{name} has dtype {e.dtype}, which cannot be converted; use another checkpoint.")
        tensors[name] = SourceTensor(shard, name, e.dtype, e.shape, e.start, e.end)
    return tensors


def identity(tensors: Mapping[str, SourceTensor]) -> dict[str, dict[str, Any]]:
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
