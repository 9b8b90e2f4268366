"""All models' snapshots on disk together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ring_mlx.engine.snapshots.folder import MODEL_NAME
from ring_mlx.engine.snapshots.manifest import VERSION
from ring_mlx.engine.snapshots.store import Store, default_folder

if TYPE_CHECKING:
    from ring_mlx.engine.events import ModelOptions
    from ring_mlx.model.model import Model


def stores(root: Path, say: Callable[[str], object]) -> list[Store]:
    """Every model's snapshots in a folder; ``say`` is told what is a link, another user's or none of ours."""
    found = []
    try:
        for path in _folders(root / f"v{VERSION}"):
            store = Store(root, path.name, 1 << 62)
            try:
                if not MODEL_NAME.fullmatch(path.name):
                    raise ValueError("it is no folder of snapshots")
                store.check()
                found.append(store)
            except (OSError, ValueError) as e:
                say(f"{path} is ignored ({e}); mend or remove it.")
    except OSError as e:
        say(f"{root} cannot be used ({e}); mend it or give another folder.")
    return found


def open_store(options: ModelOptions, model: Model, form: str = "", kv_bits: int | None = None) -> Store | None:
    """The snapshots of a model on disk, which its sessions and servers share; None where none are kept.

    Args:
        options: Which folder, and how many bytes.
        model: The model.
        form: Tells apart those that are kept in another form.
        kv_bits: As for `Store`.
    """
    if options.store is False or not model.fingerprint:
        return None
    root = default_folder() if options.store is True else Path(os.path.expanduser(options.store))
    name, shapes = Path(options.model).name, model.cache_shapes
    return Store(root, model.fingerprint + form, options.store_budget_bytes, kv_bits, name, shapes)


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(p for p in parent.iterdir() if p.name[0] != ".")
    except FileNotFoundError:
        return []


def free_disk(nbytes: int, near: str | os.PathLike[str], store: str | os.PathLike[str] | bool = True) -> int:
    """Remove snapshots, those used longest ago first, until a disk has so much free: what can be read again gives way.

    Args:
        nbytes: Bytes that shall be free.
        near: A file or folder on the disk; snapshots on another one stay.
        store: As for `Session`.

    Returns:
        The bytes freed.
    """
    root = default_folder() if store is True else Path(store) if store else None
    freed = 0
    with suppress(OSError, ValueError):
        if root is None or os.stat(root).st_dev != os.stat(near).st_dev:
            return 0
        for one in sorted(stores(root, lambda _: None), key=Store.last_used):
            missing = nbytes - shutil.disk_usage(near).free
            if missing <= 0:
                break
            freed += one.give_way(missing)
    return freed
