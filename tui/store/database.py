"""One SQLite file, shared with other windows; turns its failures into one line; knows no table."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ring_mlx import RingError
from tui.store.migrations import NEWEST, migrate, version_of

WAIT_S, TRIES = 0.25, 4
Statement = tuple[str, Sequence[Any]]

REMEDIES = (
    ("locked", "is kept busy by another window; what is new stays in memory and is saved when it is free"),
    ("busy", "is kept busy by another window; what is new stays in memory and is saved when it is free"),
    ("readonly", "cannot be written; check its permissions, what is new stays in memory"),
    ("read-only", "cannot be written; check its permissions, what is new stays in memory"),
    ("permission", "cannot be written; check its permissions, what is new stays in memory"),
    ("full", "has no room left; free some disk space, what is new stays in memory until then"),
    ("unable to open", "cannot be opened; check the folder and its permissions, what is new stays in memory"),
    ("not a database", "is damaged; move it away and start again, what is new stays in memory"),
    ("malformed", "is damaged; move it away and start again, what is new stays in memory"),
)


class StoreError(RingError):
    """The store could not be read or written."""

    origin = "store"


class Database:
    """An open store.

    Args:
        path: The file, made if it is missing; None keeps everything in memory.
        wait_s: How long one try waits for another process.

    Raises:
        StoreError: If it cannot be opened, is damaged or of a newer version.
    """

    def __init__(self, path: Path | None, wait_s: float = WAIT_S) -> None:
        self.path, self.name = path, path.name if path else "memory"
        with self._one_line():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path or ":memory:", timeout=wait_s, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        c = self._connection
        c.row_factory = sqlite3.Row
        found = version_of(c)
        if found > NEWEST:
            raise StoreError(
                f"{self.path} was written by a newer ring-mlx (format {found}, this one reads {NEWEST}); upgrade "
                "ring-mlx, what is new stays in memory."
            )
        self._patiently(lambda: c.execute("PRAGMA journal_mode = WAL"))
        c.execute("PRAGMA synchronous = NORMAL")
        c.execute("PRAGMA foreign_keys = ON")
        self._patiently(lambda: migrate(c))

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query.

        Raises:
            StoreError: If it fails.
        """
        with self._one_line():
            return self._connection.execute(sql, values).fetchall()

    def write(self, *statements: Statement, tries: int = TRIES) -> None:
        """Run statements in one transaction; waits and tries again while another process writes.

        Raises:
            StoreError: If it fails; nothing has changed then.
        """
        with self._one_line():
            self._patiently(lambda: self._transact(statements), tries)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _transact(self, statements: Sequence[Statement]) -> None:
        c = self._connection
        c.execute("BEGIN IMMEDIATE")
        try:
            for sql, values in statements:
                c.execute(sql, values)
            c.execute("COMMIT")
        except BaseException:
            if c.in_transaction:
                c.execute("ROLLBACK")
            raise

    def _patiently(self, action: Any, tries: int = TRIES) -> None:
        for n in range(1, tries + 1):
            try:
                action()
                return
            except sqlite3.OperationalError as e:
                if n == tries or not ("locked" in str(e) or "busy" in str(e)):
                    raise
                time.sleep(0.01 * n)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            said = str(e)
            remedy = next((r for word, r in REMEDIES if word in said.lower()), "failed; what is new stays in memory")
            raise StoreError(f"{self.path or 'the store'} {remedy} ({said}).") from None
