"""Removes what writers that were killed left behind."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

# A living writer holds a lock on its file, but not on every file system, and older versions held none.
STALE_S = 24 * 3600.0
_swept: set[Path] = set()


def hold(handle: int) -> None:
    """Mark an open file as being written, for as long as it is open."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(folder: Path, prefix: str) -> None:
    """Once for each folder, remove this user's unfinished files that nobody holds and that are a day old."""
    if folder in _swept:
        return
    _swept.add(folder)
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{16}\.safetensors")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_stale(entry.path)


def _remove_if_stale(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if is_ours and time.time() - found.st_mtime > STALE_S:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    finally:
        os.close(handle)
