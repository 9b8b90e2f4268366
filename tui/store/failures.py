"""Why the store failed, in one line with a remedy."""

from __future__ import annotations

import errno
import sqlite3

from ring_mlx import RingError

BUSY, FULL, DENIED, DAMAGED, NEWER, OTHER = "busy", "full", "denied", "damaged", "newer", "other"

_SQLITE = {
    sqlite3.SQLITE_BUSY: BUSY,
    sqlite3.SQLITE_LOCKED: BUSY,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: DENIED,
    sqlite3.SQLITE_PERM: DENIED,
    sqlite3.SQLITE_CANTOPEN: DENIED,
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_FORMAT: DAMAGED,
}
_WORDS = (  # of failures without a code
    ("full", FULL),
    ("locked", BUSY),
    ("busy", BUSY),
    ("readonly", DENIED),
    ("unable to open", DENIED),
    ("malformed", DAMAGED),
    ("not a database", DAMAGED),
)
_SYSTEM = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: DENIED,
    errno.ENOTDIR: DENIED,
}
_REMEDIES = {
    BUSY: "is kept busy by another window; what is new stays in memory and is saved when it is free",
    FULL: "has no room left; free some disk space, what is new stays in memory until then",
    DENIED: "cannot be opened or written; check the folder and its permissions, what is new stays in memory",
    DAMAGED: "is damaged; close other windows and start again to have it mended, what is new stays in memory",
    OTHER: "failed; check the disk, what is new stays in memory",
}


class StoreError(RingError):
    """The store could not be read or written.

    Args:
        text: What happened, and what to do.
        kind: One of the kinds of this module.
    """

    origin = "store"

    def __init__(self, text: str, kind: str = OTHER) -> None:
        super().__init__(text)
        self.kind = kind


class DamagedError(sqlite3.DatabaseError):
    """A check has found that the file is not as it was written."""


FAILURES = (sqlite3.Error, OSError, UnicodeDecodeError, MemoryError)


def kind_of(e: Exception) -> str:
    """The kind of a failure of SQLite or of the system."""
    if isinstance(e, (DamagedError, UnicodeDecodeError)):
        return DAMAGED
    if isinstance(e, OSError):
        return _SYSTEM.get(e.errno or 0, OTHER)
    code: int | None = getattr(e, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_IOERR_SHMSIZE:
        return FULL  # the index of the log could not be made larger
    if code is not None:
        return _SQLITE.get(code & 0xFF, OTHER)
    return next((kind for word, kind in _WORDS if word in str(e).lower()), OTHER)


def in_one_line(name: object, e: Exception) -> StoreError:
    """The failure as the user sees it."""
    kind = kind_of(e)
    return StoreError(f"{name} {_REMEDIES[kind]} ({' '.join(str(e).split())}).", kind)
