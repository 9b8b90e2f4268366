"""Shards in which the matrices of one expert lie side by side.

The rest of a conversion writes stacks of experts, row by row; here each piece of a stack finds its places. Checksums of
the experts go into the header once all is written; until then their room is filled with zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import BITS, TensorSpec, header_bytes
from ring_mlx.checkpoint.weights import EXPERT_DIGESTS
from ring_mlx.convert.writer import ShardFile
from ring_mlx.experts.layout import (
    ALIGN_BYTES,
    DIGEST_CHARACTERS,
    PADDING,
    expert_name,
    in_expert_order,
)

HASH_BLOCK_BYTES = 1 << 20


class ExpertShardFile(ShardFile):
    """Same contract as `ShardFile` for the stacks of one layer's experts.

    Args:
        path: Where; what is there is replaced.
        tensors: The stacks [E, ...].
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        by_name = {t.name.partition(".switch_mlp.")[2]: t for t in tensors}
        order = in_expert_order([(n, BITS[t.dtype]) for n, t in by_name.items()])
        ordered = [by_name[name] for name in order]
        self._experts = tensors[0].shape[0]
        self._each = {t.name: t.nbytes // self._experts for t in ordered}
        self._inside: dict[str, int] = {}
        at = 0
        for t in ordered:
            self._inside[t.name] = at
            at += self._each[t.name]
        self._length, self._stride = at, -(-at // ALIGN_BYTES) * ALIGN_BYTES
        self._header = self._header_of(ordered)
        self._file: Any = path.open("w+b")
        self._base = self._write_header("0" * DIGEST_CHARACTERS for _ in range(self._experts))
        self._left = {t.name: t.nbytes for t in ordered}
        self._file.truncate(self._base + self._stride * self._experts)

    def write(self, name: str, at_byte: int, array: mx.array) -> int:
        """As `ShardFile.write`, into as many experts as the bytes belong to."""
        plain: Any = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        data, each, done = memoryview(plain).cast("B"), self._each[name], 0
        while done < data.nbytes:
            expert, inside = divmod(at_byte + done, each)
            size = min(each - inside, data.nbytes - done)
            self._file.seek(self._base + expert * self._stride + self._inside[name] + inside)
            self._file.write(data[done : done + size])
            done += size
        self._left[name] -= data.nbytes
        return data.nbytes

    def close(self) -> None:
        """Note the checksums and end the file."""
        assert not any(self._left.values()), "a tensor was not written whole"
        self._file.flush()
        digests = [self._digest(e) for e in range(self._experts)]
        self._write_header(digests)
        self._file.close()

    def _header_of(self, ordered: Sequence[TensorSpec]) -> dict[str, Any]:
        header: dict[str, Any] = {}
        for e in range(self._experts):
            start = e * self._stride
            for t in ordered:
                at = start + self._inside[t.name]
                entry = {"dtype": t.dtype, "shape": list(t.shape[1:]), "data_offsets": [at, at + self._each[t.name]]}
                header[expert_name(t.name, e)] = entry
            left = self._stride - self._length
            if left:
                name = f"{expert_name(ordered[0].name, e).partition(f'.experts.{e}.')[0]}.experts.{e}.{PADDING}"
                end = start + self._stride
                header[name] = {"dtype": "U8", "shape": [left], "data_offsets": [end - left, end]}
        return header

    def _write_header(self, digests: Any) -> int:
        """Write it, the same length whatever the checksums are; returns where data begins, a multiple of 16 KiB."""
        metadata = {"format": "mlx", EXPERT_DIGESTS: " ".join(digests)}
        self._file.seek(0)
        return int(self._file.write(header_bytes(self._header, metadata, ALIGN_BYTES)))

    def _digest(self, expert: int) -> str:
        digest, left = hashlib.sha256(), self._length
        self._file.seek(self._base + expert * self._stride)
        while left:
            block = self._file.read(min(left, HASH_BLOCK_BYTES))
            digest.update(block)
            left -= len(block)
        return digest.hexdigest()[:DIGEST_CHARACTERS]


def streamed_names(tensors: Sequence[TensorSpec]) -> list[str]:
    """Names of what an `ExpertShardFile` of these stacks holds, without padding."""
    return [expert_name(t.name, e) for t in tensors for e in range(t.shape[0])]
