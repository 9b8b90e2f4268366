"""Where the chat keeps its files; RING_MLX_HOME puts all of them into one folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

APP, HOME = "ring-mlx", "RING_MLX_HOME"


def config_file() -> Path:
    """The configuration, in the platform's folder for such files."""
    return (_home() or platformdirs.user_config_path(APP)) / "config.toml"


def data_file(name: str) -> Path:
    """A file of the user's data: the store, the plain mode's history."""
    return (_home() or platformdirs.user_data_path(APP)) / name


def snapshots() -> str | bool:
    """The folder of snapshots, as `ring_mlx.Session` takes it: its own one, or one in the folder for everything."""
    return str(data_file("snapshots")) if _home() else True


def _home() -> Path | None:
    home = os.environ.get(HOME)
    return Path(os.path.expanduser(home)) if home else None


def in_words(e: Exception) -> str:
    """What is wrong with a file, without the number of an error or the name that a sentence has already."""
    if isinstance(e, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return (e.strerror if isinstance(e, OSError) else None) or str(e)
