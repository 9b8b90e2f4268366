"""Lets only the user open the files of a store, and finds windows that have them open."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

FOLDER, FILE = 0o700, 0o600
OURS = ("chats.db", "config.toml", "history", "snapshots", ".writing-", ".DS_Store")  # how the names of our files begin
LOCK_WAIT_S = 3.0


def make_private(path: Path) -> list[str]:
    """Make a file and its folder private; returns a line about other users' rights that cannot be removed.

    Raises:
        OSError: If they cannot be made, or something else than a file is there.
    """
    if not path.parent.is_dir():
        path.parent.mkdir(mode=FOLDER, parents=True, exist_ok=True)
        path.parent.chmod(FOLDER)  # a umask may have taken the owner's rights away too
    if not path.exists():
        os.close(new_file(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.ENOTDIR, "it is not a file", str(path))
    files = (path, *(path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm")))
    open_to_others = [p for p in (path.parent, *files) if not _is_tightened(p)]
    if not open_to_others:
        return []
    return [f"[store] others may read {open_to_others[0]}, which cannot be changed here; put RING_MLX_HOME elsewhere."]


def new_file(path: Path) -> int:
    """A handle of a file; a missing one is made private, whatever the umask."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, FILE)
    if stat.S_IMODE(os.fstat(handle).st_mode) != FILE:
        with contextlib.suppress(OSError):
            os.fchmod(handle, FILE)
    return handle


def _is_tightened(path: Path) -> bool:
    """Whether only the owner may read a path now; a folder that also holds other files stays as it is."""
    try:
        found = path.stat()
        is_folder = stat.S_ISDIR(found.st_mode)
        wanted = FOLDER if is_folder else FILE
        if stat.S_IMODE(found.st_mode) == wanted or (is_folder and _is_shared(path, found)):
            return True
        path.chmod(wanted)
    except FileNotFoundError:
        return True
    except OSError:
        return not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return True


def _is_shared(folder: Path, found: os.stat_result) -> bool:
    if found.st_mode & stat.S_ISVTX or folder.resolve() == Path.home().resolve():
        return True
    return not all(name.startswith(OURS) for name in os.listdir(folder))


class Windows:
    """A lock file that each window holds with the others while it has the store open.

    Args:
        path: The store.

    Raises:
        OSError: If another window is mending it and does not end.
    """

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        with contextlib.suppress(OSError):  # a folder that cannot be written: nothing can be mended there
            self._handle = new_file(path.with_name(f"{path.name}.lock"))
        self._lock(fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Whether no other window has the store open at this moment."""
        if self._handle is None:
            return False
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            self._lock(fcntl.LOCK_SH)
        return True

    def alone(self) -> None:
        """Lock the store for this window only; `together` ends that.

        Raises:
            OSError: If another window has the store open, or the lock cannot be taken.
        """
        if self._handle is None:
            raise OSError(errno.EACCES, "the folder cannot be written")
        self._lock(fcntl.LOCK_UN)
        self._lock(fcntl.LOCK_EX)

    def together(self) -> None:
        self._lock(fcntl.LOCK_SH)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def _lock(self, kind: int) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while self._handle is not None:
            try:
                fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, "another window has it open") from None
                time.sleep(0.02)
