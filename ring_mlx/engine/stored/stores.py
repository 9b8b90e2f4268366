"""All models' snapshots on disk together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from ring_mlx.engine.stored.folder import MODEL_NAME, ModelFolder
from ring_mlx.engine.stored.manifest import VERSION


def default_folder() -> Path:
    """The system's folder for an application's caches, or ``RING_MLX_CACHE``."""
    named = os.environ.get("RING_MLX_CACHE")
    return Path(os.path.expanduser(named)) if named else user_cache_path("ring-mlx", appauthor=False)


def stores(root: Path, say: Callable[[str], object]) -> list[ModelFolder]:
    """Every model's snapshots in a folder; ``say`` gets a line for each link, foreign file or other user's folder."""
    found = []
    try:
        for path in _folders(root / f"v{VERSION}"):
            store = ModelFolder(root, path.name)
            try:
                if not MODEL_NAME.fullmatch(path.name):
                    raise ValueError("it is not a folder of snapshots")
                store.check()
                found.append(store)
            except (OSError, ValueError) as e:
                say(f"{path} is ignored ({e}); repair or remove it.")
    except OSError as e:
        say(f"{root} cannot be used ({e}); repair it or give another folder.")
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(p for p in parent.iterdir() if p.name[0] != ".")
    except FileNotFoundError:
        return []


def free_disk(nbytes: int, near: str | os.PathLike[str], store: str | os.PathLike[str] | bool = True) -> int:
    """Remove snapshots, those used longest ago first, until a disk has this much free; they can be computed again.

    Snapshots on another disk than that of ``near`` stay. ``store`` is as for `Session`. Returns the bytes freed.
    """
    root = default_folder() if store is True else Path(store) if store else None
    freed = 0
    with suppress(OSError, ValueError):
        if root is None or os.stat(root).st_dev != os.stat(near).st_dev:
            return 0
        for one in sorted(stores(root, lambda _: None), key=ModelFolder.last_used):
            missing = nbytes - shutil.disk_usage(near).free
            if missing <= 0:
                break
            freed += one.give_way(missing)
    return freed
