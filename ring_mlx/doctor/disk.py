"""Free space and permissions of the folders for downloads and snapshots."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding

GB = 1e9
_finding = partial(Finding, "disk")
LEAST_BYTES = 1e9
# Ring-mini-linear-2.0 in 4 bits, and room to write beside it.
MINI_BYTES = 12e9


def check() -> list[Finding]:
    """Look at the hub's cache and at ours."""
    import mlx.core as mx
    from huggingface_hub import constants

    from metal_kernels.twin.kernel import cache_folder
    from ring_mlx.engine.stored.stores import default_folder

    out = [
        folder("downloads", Path(constants.HF_HUB_CACHE), MINI_BYTES, "HF_HOME"),
        folder("snapshots", default_folder(), LEAST_BYTES, "RING_MLX_CACHE"),
    ]
    if mx.cuda.is_available():
        out.append(folder("kernels", cache_folder(), LEAST_BYTES / 10, "XDG_CACHE_HOME"))
    return out


def folder(name: str, path: Path, wanted_bytes: float, variable: str) -> Finding:
    """Free space at a folder, which need not exist yet; less than 1 GB is a problem. ``variable`` moves the folder."""
    path = Path(os.path.expanduser(path)).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    seen, data = f"{free / GB:.1f} GB free at {path}", {"path": str(path), "free_bytes": free}
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        remedy = f"change its permissions or set {variable}"
        return _finding(name, PROBLEM, f"{existing} cannot be written", remedy, data)
    if free < min(wanted_bytes, LEAST_BYTES):
        return _finding(name, PROBLEM, seen, f"free some space, or set {variable} to another disk", data)
    if free < wanted_bytes:
        remedy = f"Ring-mini in 4 bits wants {wanted_bytes / GB:.0f} GB; free some, or set {variable} to another disk"
        return _finding(name, NOTE, seen, remedy, data)
    return _finding(name, OK, seen, data=data)
