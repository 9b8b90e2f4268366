"""Files that are whole or absent: atomic writes, names that are checksums, one lock a folder; knows no snapshot."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

TEMPORARY = ".writing-"


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a new file, then put it in the place of ``path``; a reader sees the old or the new one.

    Raises:
        OSError: If there is no space or no permission; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=".safetensors")
    os.close(handle)
    try:
        write(name)
        _sync(name)
        os.replace(name, path)
        _sync(path.parent)
    except BaseException:
        if os.path.exists(name):
            os.unlink(name)
        raise


def write_blob(folder: Path, arrays: Mapping[str, mx.array], header: Mapping[str, str]) -> tuple[str, int]:
    """Write arrays to a safetensors file whose name is its SHA-256; the same content is written once.

    Returns:
        The name and the size in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=TEMPORARY, suffix=".safetensors")
    os.close(handle)
    try:
        mx.save_safetensors(temporary, dict(arrays), dict(header))
        name, size = checksum(Path(temporary)), os.path.getsize(temporary)
        path = blob_path(folder, name)
        if path.exists() and path.stat().st_size == size:
            os.unlink(temporary)
        else:
            _sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return name, size


def read_blob(folder: Path, name: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the header of a blob.

    Raises:
        ValueError: If the content is not what the name says.
        OSError: If the file is missing or unreadable.
    """
    path = blob_path(folder, name)
    found = checksum(path)
    if found != name:
        raise ValueError(f"{path.name} does not hold what its name says")
    try:
        arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
    except RuntimeError:
        if path.exists():
            raise
        raise FileNotFoundError(path) from None
    assert isinstance(arrays, dict)
    assert isinstance(header, dict)
    mx.eval(arrays)
    return arrays, {name: str(text) for name, text in header.items()}


def blob_path(folder: Path, name: str) -> Path:
    """Where a blob of that name is."""
    return folder / f"{name}.safetensors"


def array_checksum(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 of names, shapes, dtypes and contents, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.dtype} {a.shape} ".encode())
        digest.update(np.array(mx.contiguous(a).reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees even where the process is killed; makes the folder, for its
    owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
