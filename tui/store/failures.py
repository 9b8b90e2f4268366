"""Why the store failed, in one line with a remedy."""

from __future__ import annotations

import errno
import sqlite3

from ring_mlx import RingError
from tui.paths import in_words

BUSY, FULL, DENIED, DAMAGED, NEWER, OTHER = "busy", "full", "denied", "damaged", "newer", "other"

# Each kind with its codes of SQLite, words of messages that have none, and codes of the system.
_KINDS = (
    (FULL, (sqlite3.SQLITE_FULL,), ("full",), (errno.ENOSPC, errno.EDQUOT)),
    (BUSY, (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), ("locked", "busy"), ()),
    (
        DENIED,
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN),
        ("readonly", "unable to open"),
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
    ),
    (
        DAMAGED,
        (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT),
        ("malformed", "not a database"),
        (),
    ),
)
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
    """A check found that the file is damaged."""


FAILURES = (sqlite3.Error, OSError, UnicodeDecodeError, MemoryError)


def kind_of(e: Exception) -> str:
    """The kind of a failure of SQLite or of the system."""
    if isinstance(e, (DamagedError, UnicodeDecodeError)):
        return DAMAGED
    if isinstance(e, OSError):
        return next((kind for kind, _, _, codes in _KINDS if e.errno in codes), OTHER)
    code: int | None = getattr(e, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_IOERR_SHMSIZE:
        return FULL  # the index of the log could not be made larger
    if code is not None:
        return next((kind for kind, codes, _, _ in _KINDS if code & 0xFF in codes), OTHER)
    return next((kind for kind, _, words, _ in _KINDS if any(word in str(e).lower() for word in words)), OTHER)


def in_one_line(name: object, e: Exception) -> StoreError:
    """The failure as the user sees it."""
    kind = kind_of(e)
    return StoreError(f"{name} {_REMEDIES[kind]} ({' '.join(in_words(e).split())}).", kind)
