"""Safetensors files that are written piece by piece, tensors one behind the other or the matrices of an expert together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import BITS, TensorSpec, header_bytes
from ring_mlx.checkpoint.weights import EXPERT_DIGESTS
from ring_mlx.experts.layout import ALIGN_BYTES, DIGEST_CHARACTERS, PADDING, expert_name, in_expert_order

HASH_BLOCK_BYTES = 1 << 20


class ShardFile:
    """A file whose tensors are written in pieces, in any order; `PartialFolder.finish_shard` brings it to the disk."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        self._starts: dict[str, int] = {}
        # A tensor is cut into equal pieces, which begin every so many bytes.
        self._piece, self._stride = {t.name: t.nbytes for t in tensors}, 0
        self._left = dict(self._piece)
        self._digests: list[str] = []
        self._entries = self._lay_out(tensors)
        self._file: Any = path.open("w+b")
        self._base = self._write_header()

    def write(self, name: str, at_byte: int, array: mx.array) -> int:
        """Put an array's bytes into a tensor, ``at_byte`` bytes from its start; returns how many there were."""
        plain: Any = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        data, piece, done = memoryview(plain).cast("B"), self._piece[name], 0
        while done < data.nbytes:
            number, inside = divmod(at_byte + done, piece)
            size = min(piece - inside, data.nbytes - done)
            self._file.seek(self._base + self._starts[name] + number * self._stride + inside)
            self._file.write(data[done : done + size])
            done += size
        self._left[name] -= data.nbytes
        return data.nbytes

    def close(self) -> None:
        """End a file that is written whole."""
        assert not any(self._left.values()), "a tensor was not written whole"
        self._file.close()

    def abandon(self) -> None:
        """Close an unfinished file, whatever state it is in."""
        with suppress(OSError):
            self._file.close()

    def _lay_out(self, tensors: Sequence[TensorSpec]) -> dict[str, Any]:
        """Find a place for each tensor; returns the entries of the header."""
        entries, at = {}, 0
        # Wide types first, so that every tensor is aligned.
        for t in sorted(tensors, key=lambda t: (-BITS[t.dtype], t.name)):
            entries[t.name], self._starts[t.name] = _entry(t.dtype, t.shape, at, t.nbytes), at
            at += t.nbytes
        return entries

    def _write_header(self) -> int:
        """Write it, of the same length whatever the checksums are; returns where data begins."""
        metadata, align = {"format": "mlx"}, 8
        if self._digests:
            metadata[EXPERT_DIGESTS], align = " ".join(self._digests), ALIGN_BYTES
        self._file.seek(0)
        return int(self._file.write(header_bytes(self._entries, metadata, align)))


class ExpertShardFile(ShardFile):
    """Same contract as `ShardFile` for the stacks [E, ...] of one layer, in the layout of `ring_mlx.experts.layout`.

    Checksums of the experts go into the header once all is written; until then zeros hold their room.
    """

    def close(self) -> None:
        self._file.truncate(self._base + self._stride * len(self._digests))
        self._file.flush()
        self._digests = [self._digest(e) for e in range(len(self._digests))]
        self._write_header()
        super().close()

    def _lay_out(self, tensors: Sequence[TensorSpec]) -> dict[str, Any]:
        order, count, self._length = in_expert_order(tensors), tensors[0].shape[0], 0
        for t in order:
            self._starts[t.name], self._piece[t.name] = self._length, t.nbytes // count
            self._length += self._piece[t.name]
        self._stride = -(-self._length // ALIGN_BYTES) * ALIGN_BYTES
        self._digests = ["0" * DIGEST_CHARACTERS] * count
        entries, padding = {}, self._stride - self._length
        for e in range(count):
            for t in order:
                at = e * self._stride + self._starts[t.name]
                entries[expert_name(t.name, e)] = _entry(t.dtype, t.shape[1:], at, self._piece[t.name])
            if padding:
                layer = order[0].name.partition(".switch_mlp.")[0]
                at = e * self._stride + self._length
                entries[f"{layer}.experts.{e}.{PADDING}"] = _entry("U8", (padding,), at, padding)
        return entries

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


def _entry(dtype: str, shape: Sequence[int], at: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
