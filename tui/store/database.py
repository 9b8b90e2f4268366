"""One SQLite file, shared with other windows; turns its failures into one line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tui.store.access import Windows, make_private
from tui.store.connection import TRIES, check_index, connect, patiently
from tui.store.failures import DAMAGED, FAILURES, DamagedError, in_one_line, kind_of
from tui.store.migrations import REBUILD_INDEX
from tui.store.rescue import READY, beside, finish, rescue

WAIT_S = 0.25
Statement = tuple[str, Sequence[Any]]
Change = Callable[[sqlite3.Connection], None]
T = TypeVar("T")


class Database:
    """An open store.

    Args:
        path: The file, made if it is missing; None keeps everything in memory.
        wait_s: How long one try waits for another process.

    Attributes:
        notes: Lines for the user: what was wrong with the file and what was done about it.

    Raises:
        StoreError: If it cannot be opened or is of a newer version, or is damaged and cannot be mended.
    """

    def __init__(self, path: Path | None, wait_s: float = WAIT_S) -> None:
        self.path, self.notes = path, list[str]()
        self._wait_s, self._windows, self._has_checked_index = wait_s, None, path is None
        with self._one_line():
            if path is None:
                self._connection = connect(None, wait_s)
                return
            self.notes += make_private(path)
            self._windows = Windows(path)
            try:
                self._connection = self._opened(path)
            except BaseException:
                self._windows.close()
                raise
            self._file = os.stat(path)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query; raises `StoreError`."""
        with self._one_line():
            return self._run(lambda: self._connection.execute(sql, values).fetchall())

    def write(self, *changes: Statement | Change, tries: int = TRIES) -> None:
        """Make all changes or, with a `StoreError`, none; waits and tries again while another process writes."""
        with self._one_line():
            self._run(lambda: patiently(lambda: self._transact(changes), tries))

    def mend_index(self) -> bool:
        """Check the index of words against the turns, once; returns whether it was rebuilt."""
        if self._has_checked_index:
            return False
        self._has_checked_index = True
        with self._one_line():
            return check_index(self._connection)

    @property
    def is_there(self) -> bool:
        """Whether the file is still there: writes to a removed file are lost."""
        try:
            return self.path is None or os.path.samestat(os.stat(self.path), self._file)
        except OSError:
            return False

    @property
    def version(self) -> int:
        """A number that is another one once another window has written."""
        return int(self.read("PRAGMA data_version")[0][0])

    @property
    def is_shared(self) -> bool:
        """Whether another window has the store open now."""
        return self._windows is not None and not self._windows.is_alone()

    def close(self) -> None:
        self._connection.close()
        if self._windows is not None:
            self._windows.close()

    def _opened(self, path: Path) -> sqlite3.Connection:
        """The connection, to a new store if the old one is damaged."""
        if beside(path, READY).exists():
            self._alone(lambda: finish(path))
        try:
            is_alone = beside(path, "-wal").exists() and self._windows is not None and self._windows.is_alone()
            return connect(path, self._wait_s, is_log_checked=is_alone)
        except sqlite3.DatabaseError as e:
            if kind_of(e) != DAMAGED:
                raise
        return self._alone(lambda: self._mended(path))

    def _mended(self, path: Path) -> sqlite3.Connection:
        try:
            return connect(path, self._wait_s, is_log_checked=True)  # another window may have been faster
        except sqlite3.DatabaseError as e:
            if kind_of(e) != DAMAGED:
                raise
        try:
            self.notes.append(rescue(path))
        except (sqlite3.Error, OSError):
            raise
        except Exception as e:  # noqa: BLE001 there is no end to what a damaged file may hold; this one stays as it is
            raise DamagedError(f"it could not be repaired: {type(e).__name__}: {e}") from None
        return connect(path, self._wait_s)

    def _alone(self, action: Callable[[], T]) -> T:
        assert self._windows is not None
        self._windows.alone()
        try:
            return action()
        finally:
            self._windows.together()

    def _run(self, action: Callable[[], T]) -> T:
        """The result of an action, tried again after a damage that does not matter."""
        try:
            return action()
        except sqlite3.OperationalError as e:
            if "decode" not in str(e):
                raise
            self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
        except sqlite3.DatabaseError as e:
            if kind_of(e) != DAMAGED:
                raise
            self._transact([(REBUILD_INDEX, ())])
        return action()

    def _transact(self, changes: Sequence[Statement | Change]) -> None:
        c = self._connection
        c.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                if callable(change):
                    change(c)
                else:
                    c.execute(*change)
            c.execute("COMMIT")
        except BaseException:
            if c.in_transaction:
                c.execute("ROLLBACK")
            raise

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as e:
            raise in_one_line(self.path or "the store", e) from None
