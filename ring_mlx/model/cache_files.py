"""Files of arrays: reading them with care, and checksums of them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

UNSEALED = "0" * 64
MOST_HEADER_BYTES = 1 << 20  # ours have a few kilobytes; a large one takes seconds and gigabytes to read


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays, not read yet, and the metadata of a safetensors file, whose header is checked against its size.

    Raises ValueError if it is not a safetensors file; OSError if the file is missing or unreadable.
    """
    with open(path, "rb") as f:
        if int.from_bytes(f.read(8), "little") > MOST_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MOST_HEADER_BYTES} bytes")
    try:
        with safe_open(path, framework="numpy") as f:  # MLX believes a header; this checks it.
            header = dict(f.metadata() or {})
        arrays = mx.load(str(path), format="safetensors")
    except (SafetensorError, RuntimeError) as e:
        if os.path.exists(path):
            raise ValueError(str(e)) from None
        raise FileNotFoundError(path) from None
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from None
    assert isinstance(arrays, dict)
    return arrays, header


def seal(path: Path) -> None:
    """Put a safetensors file's SHA-256 into its metadata, in the place of `UNSEALED` under "checksum"."""
    digest, at = _sealed_checksum(path, UNSEALED)
    with path.open("r+b") as f:
        f.seek(at)
        f.write(digest.encode())


def check_seal(path: Path, digest: str) -> None:
    """Check a file against its `seal`: no byte may have changed. Raises ValueError if one did."""
    if _sealed_checksum(path, digest)[0] != digest:
        raise ValueError("it does not match its checksum")


def _sealed_checksum(path: Path, sealed: str) -> tuple[str, int]:
    """SHA-256 of a file as if it had no seal yet, and where its seal is."""
    with path.open("rb") as f:
        length = f.read(8)
        header = f.read(int.from_bytes(length, "little"))
        entry, blank = (f'"checksum":"{text}"'.encode() for text in (sealed, UNSEALED))
        if header.count(entry) != 1:
            raise ValueError("its checksum is not where it should be")
        digest = hashlib.sha256(length + header.replace(entry, blank))
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest(), 8 + header.index(entry) + entry.index(sealed.encode())


def array_checksum(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 of names, shapes, dtypes and contents, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.dtype} {a.shape} ".encode())
        digest.update(np.array(mx.contiguous(a).reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()
