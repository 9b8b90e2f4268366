"""The header of a safetensors file, checked against the file's size.

The file is 8 bytes of length n, n bytes of JSON, then the data: ``{name: {"dtype", "shape", "data_offsets"}}``, with
offsets from the end of the header, and ``__metadata__`` of texts. Tensors must cover the data without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_mlx.errors import WeightsError
from ring_mlx.model.config_values import shown
from ring_mlx.system.regular_files import MIB, open_regular, parse_object

# 100,000 tensors take 15 MiB; a file of the largest models holds a tenth of that.
MAX_HEADER_BYTES, MAX_TENSORS, MAX_AXES = 32 * MIB, 100_000, 8
# Some file systems keep no zeros, so a few holes are no damage.
MOST_HOLES, MOST_HOLE_BYTES = 10_000, 64 * MIB
METADATA = "__metadata__"
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file holds or will hold: its name, its dtype as in the header, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its dtype as the header has it, its shape, and where its data begins and ends behind the header."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def element_bytes(self) -> int:
        return BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """All axes but the last as rows; a vector is one row."""
        cols = self.shape[-1] if self.shape else 1
        return self.nbytes // max(1, cols * self.element_bytes), cols


@dataclass(frozen=True)
class Header:
    """A file's tensors by name, its metadata, and its first bytes, the length included."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: Path) -> Header:
    """Read and check the header of a file; a WeightsError names one that is missing, truncated or damaged."""
    try:
        with open_regular(file, WeightsError) as f:
            size = f.seek(0, 2)
            f.seek(0)
            raw = f.read(8)
            length = int.from_bytes(raw, "little")
            if length > MAX_HEADER_BYTES:
                raise _damaged(file, f"a header of {length} bytes")
            if 8 + length > size:
                raise _damaged(file, f"{size} bytes, less than its header")
            raw += f.read(length)
            holes = _hole_bytes(f.fileno(), size)
            if holes > max(MOST_HOLE_BYTES, size // 2):
                raise _damaged(file, f"{holes} of its {size} bytes were never written")
    except OSError as e:
        raise _damaged(file, e.strerror or str(e)) from None
    if raw.count(b"{") > MAX_TENSORS + 2:
        raise _damaged(file, f"more than {MAX_TENSORS:,} tensors")
    parsed = parse_object(raw[8:], f"the header of {file}", WeightsError)
    metadata = parsed.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "metadata that is not text")
    return Header(check_entries(file, parsed, size - 8 - length), metadata, raw)


def _hole_bytes(file: int, size: int) -> int:
    """Bytes of an open file that were never written, as after a download that reserved its size first."""
    holes = at = 0
    for _ in range(MOST_HOLES):
        start = os.lseek(file, at, os.SEEK_HOLE)
        if start >= size:
            break
        try:
            at = os.lseek(file, start, os.SEEK_DATA)
        except OSError:  # no data up to the end
            at = size
        holes += at - start
        if at >= size:
            break
    return holes


def check_entries(file: Path, parsed: Mapping[str, Any], data_bytes: int | None = None) -> dict[str, Tensor]:
    """The tensors of a parsed header without its metadata; a WeightsError if they do not lie side by side.

    They must cover ``data_bytes``; None leaves their end open.
    """
    entries = {name: _tensor(file, name, info) for name, info in parsed.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise _damaged(file, f"{shown(name)} starts at {entry.start} instead of {at}")
        at = entry.end
    if data_bytes is not None and at != data_bytes:
        raise _damaged(file, f"{data_bytes} bytes of data, but the tensors take {at}")
    return entries


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str], align: int = 8) -> bytes:
    """The start of a file, length included, up to a multiple of ``align`` bytes, where data may begin.

    ``entries`` are objects with dtype, shape and data_offsets by name.
    """
    text = json.dumps({METADATA: metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def _tensor(file: Path, name: str, info: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = info["dtype"], info["shape"], info["data_offsets"]
        whole = len(shape) <= MAX_AXES and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end))
        fits = whole and BITS[dtype] * math.prod(shape) == 8 * (end - start)
    except (LookupError, TypeError, ValueError):
        fits = False
    if not fits:
        raise _damaged(file, f"{shown(name)} is {shown(info)}")
    return Tensor(file, name, dtype, tuple(shape), start, end)


def _damaged(file: Path, seen: str) -> WeightsError:
    return WeightsError(f"{file} is truncated or damaged ({seen}); delete the file and download it again.")
