"""Room and permissions where downloads and snapshots go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ring_mlx.doctor.finding import NOTE, OK, PROBLEM, Finding

SECTION = "disk"
GB = 1e9
LEAST_BYTES = 1e9
# Ring-mini-linear-2.0 in 4 bits, and room to write beside it.
MINI_BYTES = 12e9


def check() -> list[Finding]:
    """Look at the hub's cache and at ours."""
    import mlx.core as mx
    from huggingface_hub import constants

    from metal_kernels.twin.cache import cache_folder
    from ring_mlx.engine.stored.stores import default_folder

    out = [
        folder("downloads", Path(constants.HF_HUB_CACHE), MINI_BYTES, "HF_HOME"),
        folder("snapshots", default_folder(), LEAST_BYTES, "RING_MLX_CACHE"),
    ]
    if mx.cuda.is_available():
        out.append(folder("kernels", cache_folder(), LEAST_BYTES / 10, "XDG_CACHE_HOME"))
    return out


def folder(name: str, path: Path, wanted_bytes: float, variable: str) -> Finding:
    """Free space at a folder that may not be there yet.

    Args:
        name: What it holds.
        path: The folder.
        wanted_bytes: Less free is worth a note; less than 1 GB of it free is a problem.
        variable: The environment variable that moves it.
    """
    path = Path(os.path.expanduser(path)).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    seen, data = f"{free / GB:.1f} GB free at {path}", {"path": str(path), "free_bytes": free}
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            SECTION, name, PROBLEM, f"{existing} cannot be written", f"change its permissions or set {variable}", data
        )
    if free < min(wanted_bytes, LEAST_BYTES):
        return Finding(SECTION, name, PROBLEM, seen, f"free some space, or set {variable} to another disk", data)
    if free < wanted_bytes:
        remedy = f"Ring-mini in 4 bits wants {wanted_bytes / GB:.0f} GB; free some, or set {variable} to another disk"
        return Finding(SECTION, name, NOTE, seen, remedy, data)
    return Finding(SECTION, name, OK, seen, data=data)
