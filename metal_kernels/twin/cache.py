"""Compiled kernels on disk, so that a process compiles only what no process before it did."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from metal_kernels import machine


def cache_folder() -> Path:
    """Where compiled kernels stay."""
    return machine.cache_folder() / "twin"


def cached(parts: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
    """What ``make`` returned for these parts, from disk if it was made before.

    The file is written beside its place and moved there. A folder that cannot be written costs a compilation, no more.
    """
    path = cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a kernel that is cut
        os.replace(file.name, path)
    except OSError:
        pass
    return made
