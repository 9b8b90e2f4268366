"""Rows of tensors in a checkpoint's files.

Data is read at its offset into new memory: pages of a memory map would count as this process's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ring_mlx.checkpoint.safetensors_header import Tensor
from ring_mlx.errors import WeightsError

NUMPY_DTYPES: dict[str, Any] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
}


class TensorFiles:
    """Rows of tensors of local files, or of shards for which ``fetch`` gives the local path when they are first read.

    Fetched ones are removed once as many outputs as ``uses`` says have read them.
    """

    def __init__(self, fetch: Callable[[str], Path] | None = None, uses: Mapping[str, int] | None = None) -> None:
        self._fetch = fetch
        self._left = Counter(uses or {})
        self._open: dict[Path, tuple[BinaryIO, int, Path]] = {}

    def read(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows ``start`` to ``stop``, [stop - start, cols], float8 as uint8; a WeightsError if it is short."""
        rows, cols = tensor.matrix
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise WeightsError(
                f"{tensor.name} {tensor.shape} has {rows} rows, but {start} to {stop} are needed; download the "
                "checkpoint again."
            )
        row_bytes = cols * tensor.element_bytes
        data = self._bytes(tensor, start * row_bytes, (stop - start) * row_bytes)
        array = mx.array(np.frombuffer(data, NUMPY_DTYPES[tensor.dtype]).reshape(stop - start, cols))
        return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array

    def sample(self, tensor: Tensor, nbytes: int) -> bytes:
        """Bytes from the middle of a tensor, of whatever dtype, or all if it is shorter; errors as `read`."""
        wanted = min(nbytes, tensor.nbytes)
        return self._bytes(tensor, (tensor.nbytes - wanted) // 2, wanted)

    def release(self, shards: Iterable[Path]) -> None:
        """Note that one output which reads these shards is done."""
        for shard in shards:
            self._left[shard.name] -= 1
            if self._left[shard.name] == 0 and shard in self._open:
                file, _, path = self._open.pop(shard)
                file.close()
                if self._fetch is not None:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        for file, _, _ in self._open.values():
            file.close()
        self._open.clear()

    def _bytes(self, tensor: Tensor, start: int, wanted: int) -> bytes:
        try:
            file, header = self._opened(tensor.file)
            file.seek(header + tensor.start + start)
            data = file.read(wanted)
        except OSError as e:
            raise WeightsError(f"{tensor.file} cannot be read ({e}); check the disk or download it again.") from None
        if len(data) != wanted:
            raise WeightsError(f"{tensor.file} ends within {tensor.name}; delete the file and download it again.")
        return data

    def _opened(self, shard: Path) -> tuple[BinaryIO, int]:
        if shard not in self._open:
            path = self._fetch(shard.name) if self._fetch is not None else shard
            opened = path.open("rb")
            self._open[shard] = opened, 8 + int.from_bytes(opened.read(8), "little"), path
        file, header, _ = self._open[shard]
        return file, header
