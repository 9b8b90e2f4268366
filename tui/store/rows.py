"""Rows as stored: sealed with a checksum when written, read whatever they hold.

A row whose seal does not fit is damaged: its readable values are shown with a mark, and saved without a seal,
so that the mark stays.
"""

from __future__ import annotations

import hashlib
import json
import math
from operator import itemgetter
from typing import Any, Protocol

from ring_mlx import whole_text

SEAL_BYTES, DEEPEST = 8, 100
BROKEN = b""
MARK = "(damaged)"


class Row(Protocol):
    """A row of a query or a dictionary."""

    def __getitem__(self, name: str, /) -> Any: ...


class Table:
    """A table whose rows are sealed.

    Args:
        name: In the file.
        sealed: The columns that the checksum covers, the key first.
        apart: A column with a checksum of its own, since it may be long.
    """

    def __init__(self, name: str, sealed: tuple[str, ...], apart: str = "") -> None:
        self.name, self.key, self._apart = name, sealed[0], apart
        self.content = (*sealed, apart) if apart else sealed
        self.columns = (*self.content, "seal")
        self._sealed = itemgetter(*sealed)
        self._save = f"""
            INSERT INTO {name} ({", ".join(self.columns)}) VALUES ({", ".join("?" * len(self.columns))})
            ON CONFLICT ({self.key}) DO UPDATE SET {", ".join(f"{c} = excluded.{c}" for c in self.columns[1:])}"""

    def seal(self, row: Row) -> bytes:
        """The checksum of a row's values, which are such as SQLite gives back."""
        apart = _checksum((row[self.key], row[self._apart])) if self._apart else b""
        return _checksum(self._sealed(row)) + apart

    def is_whole(self, row: Row) -> bool:
        """Whether a row is undamaged."""
        return bool(row["seal"] == self.seal(row))

    def is_sound(self, row: Row) -> bool:
        """The same without the column apart."""
        found = row["seal"]
        return isinstance(found, bytes) and found[:SEAL_BYTES] == _checksum(self._sealed(row))

    def saving(self, row: dict[str, Any], is_damaged: bool = False) -> tuple[str, tuple[Any, ...]]:
        """The statement that writes a row in place of an older one; a damaged one gets no seal."""
        return self._save, (*(row[c] for c in self.content), BROKEN if is_damaged else self.seal(row))


CHATS = Table("chats", ("id", "title", "leaf", "pinned", "deleted", "created", "changed"))
TURNS = Table(
    "turns", ("id", "chat", "parent", "role", "content", "thinking", "calls", "record", "created"), "attachments"
)
DRAFTS = Table("drafts", ("chat", "content"))
SETTINGS = Table("settings", ("chat", "content", "named"))
TABLES = (CHATS, TURNS, DRAFTS, SETTINGS)


def _checksum(values: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(ascii(values).encode(), digest_size=SEAL_BYTES).digest()


def text(value: object) -> str:
    """A column's text, whatever it holds."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def number(value: object) -> float:
    """A column's number, or 0 if it holds none."""
    try:
        found = float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0
    return found if math.isfinite(found) else 0.0


def unpacked(value: object) -> Any:
    """The value of a column of JSON.

    Raises:
        ValueError: If it is no JSON, or too deep.
    """
    packed = text(value)
    if packed == "[]":
        return []
    try:
        found = json.loads(packed)
        if packed.count("[") + packed.count("{") > DEEPEST and _depth(found) > DEEPEST:
            raise ValueError("the JSON is too deep")
    except RecursionError:
        raise ValueError("the JSON is too deep") from None
    return whole_text(found) if "\\ud" in packed.lower() else found


def is_json(row: dict[str, Any]) -> bool:
    """Whether the columns of JSON that a row has can be read, however deep they are."""
    try:
        for name in ("attachments", "calls", "record"):
            if row.get(name) is not None:
                json.loads(row[name])
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _depth(value: Any) -> int:
    """How many levels a value of JSON has, at most one more than `DEEPEST`."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        held = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level, depth = [v for values in held for v in values], depth + 1
    return depth


def marked(said: str) -> str:
    """A text that is shown as damaged."""
    return said if said.startswith(MARK) else f"{MARK} {said}".rstrip()
