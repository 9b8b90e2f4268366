"""Opens the file of a store: private, checked, brought to the newest version."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tui.store.failures import BUSY, DAMAGED, NEWER, DamagedError, StoreError, kind_of
from tui.store.migrations import CHECK_INDEX, NEWEST, REBUILD_INDEX, migrate, schema, schema_of, version_of
from tui.store.pages import is_log_whole

TRIES = 10
CHECKED_BYTES, INDEX_CHECKED_BYTES = 64_000_000, 4_000_000
MAGIC, HEADER_BYTES = b"SQLite format 3\0", 100
PRAGMAS = (
    "synchronous = FULL",  # what was said to be written outlives a power cut
    "fullfsync = ON",  # on macOS, where an ordinary fsync stops at the disk's cache
    "checkpoint_fullfsync = ON",
    "wal_autocheckpoint = 100",  # pages, so that the log of a growing answer takes little of a disk that is nearly full
    "foreign_keys = ON",
    "secure_delete = ON",  # so that a rescue finds nothing that was deleted or written over
    "cell_size_check = ON",
)
T = TypeVar("T")


def connect(path: Path | None, wait_s: float, is_log_checked: bool = False) -> sqlite3.Connection:
    """An open store of the newest version.

    Args:
        path: The file, or None for memory only.
        wait_s: How long one try waits for another process.
        is_log_checked: Also hold that the log is whole; no other process may have the store open.

    Raises:
        StoreError: If it was written by a newer version.
        sqlite3.Error: If it cannot be opened; `DamagedError` where a check finds damage.
    """
    if is_log_checked and path is not None and not is_log_whole(path):
        raise DamagedError("its log is wrong")
    if path is not None:
        _check_header(path)
    connection = sqlite3.connect(path or ":memory:", timeout=wait_s, isolation_level=None)
    try:
        _prepare(connection, path)
    except BaseException as e:
        connection.close()
        # A file of ours has all that is asked of it: such an error is a table that is missing or there already, a
        # message that quotes what is no text, or a row that would be larger than memory.
        is_ours = isinstance(e, (sqlite3.OperationalError, UnicodeDecodeError, MemoryError))
        if is_ours and getattr(e, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR:
            raise DamagedError(str(e)) from None
        raise
    return connection


def patiently(action: Callable[[], T], tries: int = TRIES) -> T:
    """The result of an action, tried again while another process is writing."""
    for n in range(1, tries):
        try:
            return action()
        except sqlite3.OperationalError as e:
            if kind_of(e) != BUSY:
                raise
            time.sleep(0.01 * n)
    return action()


def _prepare(c: sqlite3.Connection, path: Path | None) -> None:
    c.row_factory = sqlite3.Row
    found = version_of(c)
    if found > NEWEST:
        raise StoreError(
            f"{path} was written by a newer ring-mlx (format {found}, this one reads {NEWEST}); upgrade ring-mlx, "
            "what is new stays in memory.",
            NEWER,
        )
    patiently(lambda: c.execute("PRAGMA journal_mode = WAL"))
    for pragma in PRAGMAS:
        c.execute(f"PRAGMA {pragma}")
    is_new = c.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    patiently(lambda: migrate(c))
    if path is not None and not is_new:
        _check(c, path)


def _check_header(path: Path) -> None:
    """Check the file's first bytes, since SQLite misreads a file with wrong ones, or takes it as read-only."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "it is not a file")
    with path.open("rb") as f:
        head = f.read(HEADER_BYTES)
    if not head:
        return
    wanted = (
        head[:16] == MAGIC
        and set(head[18:20]) <= {1, 2}
        and head[20] == 0
        and head[56:60] in (b"\0\0\0\0", b"\0\0\0\1")
    )
    if len(head) < HEADER_BYTES or not wanted:
        raise DamagedError("its header is wrong")


def _check(c: sqlite3.Connection, path: Path) -> None:
    """Check a store against its indexes and its schema, unless it is very large."""
    found, wanted = schema_of(c), schema()
    strange = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if strange:
        raise DamagedError(f"its schema of {strange[0]} is wrong")
    if path.stat().st_size <= CHECKED_BYTES:
        said = c.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if said != "ok":
            raise DamagedError(str(said))
    if path.stat().st_size <= INDEX_CHECKED_BYTES:
        check_index(c)


def check_index(c: sqlite3.Connection) -> bool:
    """Rebuild the index of words if it does not fit the turns; returns whether it did not."""
    try:
        c.execute(CHECK_INDEX)
    except sqlite3.DatabaseError as e:
        if kind_of(e) != DAMAGED:
            return False  # another window is writing, or the file cannot be written: what is searched now is as before
        c.execute(REBUILD_INDEX)
        return True
    return False
