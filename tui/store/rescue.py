"""Makes a new store from the readable rows of a damaged one, which is kept beside it.

Each row is checked against its seal, wherever it is in the file. One that does not fit is kept too, marked as damaged;
where only a name in it is wrong, that is found by trying the names that are missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ring_mlx import whole_text
from tui.store import rows
from tui.store.access import new_file
from tui.store.connection import connect
from tui.store.pages import Pages, Values
from tui.store.records import ASSISTANT, USER
from tui.store.rows import CHATS, DRAFTS, SETTINGS, TURNS, Table

Row = dict[str, Any]
LOGS = ("-wal", "-shm")
READY, HALF, KEPT = ".rescued", ".rescuing", ".damaged-"
WAIT_S = 5.0
# Columns as they lie in the file, and the fewest of them: what older versions wrote ends sooner.
LAYOUT = {
    CHATS: (("row", "id", "title", "leaf", "pinned", "deleted", "created", "changed", "seal"), 8),
    TURNS: (
        (
            *("row", "id", "chat", "parent", "role", "content", "thinking", "attachments", "record", "created"),
            *("calls", "seal"),
        ),
        10,
    ),
    DRAFTS: (("chat", "content", "seal"), 2),
    SETTINGS: (("chat", "content", "named", "seal"), 4),
}
EMPTY = {
    **dict.fromkeys(("title", "chat", "role", "content", "thinking"), ""),
    **dict.fromkeys(("pinned", "created", "changed", "named"), 0),
    **dict.fromkeys(("attachments", "calls"), "[]"),
}
_REMAINS = re.compile(rb"([0-9a-f]{32})([0-9a-f]{32})((?:[0-9a-f]{32})?)(user|assistant)([^\0-\x08]*)")


def rescue(path: Path) -> str:
    """Put a new store in the place of a damaged one; returns a line that says so.

    Raises:
        OSError: If there is no room or no permission; the damaged file is untouched then.
        sqlite3.Error: Likewise.
    """
    found = _Found(Pages(path))
    half = beside(path, HALF)
    try:
        _remove(half)
        _write(half, found)
        os.replace(half, beside(path, READY))
    finally:
        _remove(half)
    kept = finish(path)
    whole = sum(map(TURNS.is_whole, found.turns.values()))
    lost = {turn["parent"] for turn in found.turns.values()} - {None, *found.turns}
    damaged = f", {len(found.turns) - whole} are damaged and marked so" if len(found.turns) > whole else ""
    missing = f", {len(lost)} or more are lost" if lost else ""
    return (
        f"[store] {path} was damaged; {whole} turns were read from it whole{damaged}{missing}. A new file holds them, "
        f"the damaged one is kept as {kept}."
    )


def finish(path: Path) -> Path | None:
    """Move a finished rescued store to its place, also after a process was killed while it did so."""
    ready = beside(path, READY)
    if not ready.exists():
        return None
    numbers = (beside(path, f"{KEPT}{n}") for n in range(1, 10_000))
    kept = next(name for name in numbers if not name.exists())
    for end in LOGS:  # they go first, since SQLite would apply the old log to the new store
        with contextlib.suppress(FileNotFoundError):
            os.replace(beside(path, end), beside(kept, end))
    try:
        os.link(path, kept)
    except FileNotFoundError:
        pass
    except OSError:  # not every file system has links
        shutil.copy2(path, kept)
    os.replace(ready, path)
    return kept


class _Found:
    """The readable rows of a store by their ids; whole ones are unchanged."""

    def __init__(self, pages: Pages) -> None:
        self.rows: dict[Table, dict[str, Row]] = {table: {} for table in LAYOUT}
        self.chats, self.turns = self.rows[CHATS], self.rows[TURNS]
        self._broken: list[tuple[Table, Row]] = []
        for values in pages.listed():
            self._broken += self._take(values)
        for values in pages.found():
            self._take(values)
        if not (self.turns or self.chats):
            self._take_unsealed()
        for table, row in self._broken:
            self._mend(table, row)
        self._take_remains(pages)
        for chat_id in dict.fromkeys(turn["chat"] for turn in self.turns.values()):
            self.chats.setdefault(chat_id, dict.fromkeys(LAYOUT[CHATS][0]) | {"id": chat_id})

    def _take(self, values: Values) -> Iterable[tuple[Table, Row]]:
        """Take a row of one of our tables if it is whole; else return what it may be."""
        broken = []
        for table, (columns, least) in LAYOUT.items():
            if not least <= len(values) <= len(columns) or (columns[0] == "row" and type(values[0]) is not int):
                continue
            row: Row = dict.fromkeys(columns) | dict(zip(columns, values, strict=False))
            row |= {n: float(row[n]) for n in ("created", "changed", "deleted") if type(row.get(n)) is int}
            if table.is_whole(row):
                self.rows[table].setdefault(row[table.key], row)
            elif isinstance(row[table.key], str):
                broken.append((table, row))
        return broken

    def _take_unsealed(self) -> None:
        """Take all readable rows of a file of a version without seals."""
        for table, row in self._broken:
            row |= {"calls": row["calls"] or "[]"} if "calls" in row else {}
            is_text = not any(isinstance(value, str) and "\ufffd" in value for value in row.values())
            if is_text and rows.is_json(row):
                self.rows[table].setdefault(row[table.key], row | {"seal": table.seal(row)})

    def _mend(self, table: Table, row: Row) -> None:
        """Keep a damaged row; if only a name in it is wrong, repair it."""
        if row[table.key] in self.rows[table]:
            return
        if table is TURNS:
            row = self._with_names(row)
        elif table is CHATS:
            lost = {turn["chat"] for turn in self.turns.values()} - set(self.chats)
            row = next((r for r in ({**row, "id": name} for name in lost) if CHATS.is_whole(r)), row)
        else:
            row = next((r for r in ({**row, "chat": name} for name in self.chats) if table.is_whole(r)), row)
        self.rows[table].setdefault(row[table.key], row)

    def _with_names(self, row: Row) -> Row:
        """The turn with the one name with which its seal fits, or as it is."""
        others = [turn for turn in self.turns.values() if turn["chat"] == row["chat"]]
        names: dict[str, Iterable[Any]] = {
            "chat": {*self.chats, *(turn["chat"] for turn in self.turns.values())},
            "parent": (None, *(turn["id"] for turn in others)),
            "id": {turn["parent"] for turn in others} | {chat["leaf"] for chat in self.chats.values()},
            "role": (USER, ASSISTANT),
        }
        tried = (
            {**row, column: name} for column, found in names.items() for name in found if name or column == "parent"
        )
        return next((r for r in tried if TURNS.is_whole(r)), row)

    def _take_remains(self, pages: Pages) -> None:
        """Take the text of turns of known chats whose rows are otherwise unreadable."""
        seen = {row["id"] for table, row in self._broken if table is TURNS} | set(self.turns)
        for page in pages:
            for match in _REMAINS.finditer(page):
                turn_id, chat, parent, role, text = (part.decode("utf-8", "replace") for part in match.groups())
                if turn_id not in seen and chat in self.chats:
                    remains = {"id": turn_id, "chat": chat, "parent": parent or None, "role": role, "content": text}
                    self.turns[turn_id] = dict.fromkeys(LAYOUT[TURNS][0]) | remains
                    seen.add(turn_id)


def _write(path: Path, found: _Found) -> None:
    """Write rows into a new store; damaged ones get no seal."""
    os.close(new_file(path))
    connection = connect(path, WAIT_S)
    try:
        connection.execute("BEGIN IMMEDIATE")
        for table, kept in found.rows.items():
            for row in sorted(kept.values(), key=lambda r: (r.get("row") is None, r.get("row") or 0)):
                filled = {c: EMPTY.get(c) if row[c] is None else whole_text(row[c]) for c in table.content}
                sql, values = table.saving(filled)
                seal = row["seal"] if table.is_whole(row) else rows.BROKEN
                connection.execute(sql, (*values[:-1], seal))
        connection.execute("COMMIT")
    finally:
        connection.close()


def beside(path: Path, end: str) -> Path:
    """A file beside another one whose name goes on with ``end``."""
    return path.with_name(f"{path.name}{end}")


def _remove(path: Path) -> None:
    for end in ("", *LOGS):
        beside(path, end).unlink(missing_ok=True)
