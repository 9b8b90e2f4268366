"""Makes a new store from what can be read of a damaged one, which is kept beside it.

Each row is held against its seal, wherever it lies in the file. One that does not fit is kept too, marked as damaged;
where only a name in it is wrong, that is found by trying the names that are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ring_mlx import whole_text
from tui.store import rows, seals
from tui.store.access import new_file
from tui.store.connection import connect
from tui.store.pages import Pages, Values
from tui.store.records import ASSISTANT, USER

Row = dict[str, Any]
LOGS = ("-wal", "-shm")
READY, HALF, KEPT = ".rescued", ".rescuing", ".damaged-"
WAIT_S = 5.0
# Columns as they lie in the file; what older versions wrote ends sooner.
CHAT = ("row", "id", "title", "leaf", "pinned", "deleted", "created", "changed", "seal")
TURN = (
    *("row", "id", "chat", "parent", "role", "content", "thinking", "attachments", "record", "created", "calls"),
    "seal",
)
DRAFT = ("chat", "content", "seal")
EMPTY = dict.fromkeys(("title", "chat", "role", "content", "thinking"), "") | dict.fromkeys(
    ("pinned", "created", "changed"), 0
)
EMPTY |= {"attachments": "[]", "calls": "[]"}
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
    whole = sum(map(seals.is_whole_turn, found.turns.values()))
    lost = {turn["parent"] for turn in found.turns.values()} - {None, *found.turns}
    damaged = f", {len(found.turns) - whole} are damaged and marked so" if len(found.turns) > whole else ""
    missing = f", {len(lost)} or more are lost" if lost else ""
    return (
        f"[store] {path} was damaged; {whole} turns were read from it whole{damaged}{missing}. A new file holds them, "
        f"the damaged one is kept as {kept}."
    )


def finish(path: Path) -> Path | None:
    """Put a rescued store that is ready in its place, also one of a process that was killed while it did so."""
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
    """What can be read of a store: rows by their ids, the whole ones as they were."""

    def __init__(self, pages: Pages) -> None:
        self.chats: dict[str, Row] = {}
        self.turns: dict[str, Row] = {}
        self.drafts: dict[str, Row] = {}
        self._broken: list[tuple[dict[str, Row], Row]] = []
        self._unsealed: list[tuple[dict[str, Row], Row]] = []
        for values in pages.listed():
            self._take(values, self._broken)
        for values in pages.found():
            self._take(values, [])
        if not (self.turns or self.chats):
            self._take_unsealed()
        for table, row in self._broken:
            self._mend(table, row)
        self._take_remains(pages)
        for chat_id in dict.fromkeys(turn["chat"] for turn in self.turns.values()):
            self.chats.setdefault(chat_id, dict.fromkeys(CHAT) | {"id": chat_id})

    def _take(self, values: Values, broken: list[tuple[dict[str, Row], Row]]) -> None:
        """Take a row of one of our tables if it is whole, else put it among the broken ones."""
        for table, columns, least, check in self.tables():
            if not least <= len(values) <= len(columns) or (columns[0] == "row" and type(values[0]) is not int):
                continue
            row: Row = dict.fromkeys(columns) | dict(zip(columns, values, strict=False))
            row |= {n: float(row[n]) for n in ("created", "changed", "deleted") if type(row.get(n)) is int}
            if check(row):
                table.setdefault(row[_key(row)], row)
            elif isinstance(row[_key(row)], str):
                broken.append((table, row))

    def tables(self) -> Iterable[tuple[dict[str, Row], tuple[str, ...], int, Callable[[seals.Row], bool]]]:
        """Each table with its columns, the fewest of them in any version, and the check of its seals."""
        yield self.chats, CHAT, 8, seals.is_whole_chat
        yield self.turns, TURN, 10, seals.is_whole_turn
        yield self.drafts, DRAFT, 2, seals.is_whole_draft

    def _take_unsealed(self) -> None:
        """Believe what can be read of a file of a version without seals."""
        for table, row in self._broken:
            row |= {"calls": row["calls"] or "[]"} if "calls" in row else {}
            try:
                for name in {"attachments", "calls", "record"} & {n for n, v in row.items() if v is not None}:
                    json.loads(row[name])
            except (ValueError, TypeError, RecursionError):
                continue
            if any(isinstance(value, str) and "\ufffd" in value for value in row.values()):
                continue
            seal = seals.of_chat if table is self.chats else seals.of_turn if table is self.turns else seals.of_draft
            table.setdefault(row[_key(row)], row | {"seal": seal(row)})

    def _mend(self, table: dict[str, Row], row: Row) -> None:
        """Keep a row that is not whole; where a name in it is the only thing wrong, as it was."""
        if row[_key(row)] in table:
            return
        if table is self.turns:
            row = self._with_names(row)
        elif table is self.chats:
            lost = {turn["chat"] for turn in self.turns.values()} - set(self.chats)
            row = next((r for r in ({**row, "id": name} for name in lost) if seals.is_whole_chat(r)), row)
        table.setdefault(row[_key(row)], row)

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
        return next((r for r in tried if seals.is_whole_turn(r)), row)

    def _take_remains(self, pages: Pages) -> None:
        """Take the text of turns whose rows make no sense any more, of chats that are known."""
        seen = {row["id"] for table, row in self._broken if table is self.turns} | set(self.turns)
        for page in pages:
            for match in _REMAINS.finditer(page):
                turn_id, chat, parent, role, text = (part.decode("utf-8", "replace") for part in match.groups())
                if turn_id not in seen and chat in self.chats:
                    remains = {"id": turn_id, "chat": chat, "parent": parent or None, "role": role, "content": text}
                    self.turns[turn_id] = dict.fromkeys(TURN) | remains
                    seen.add(turn_id)


def _key(row: Row) -> str:
    return "id" if "id" in row else "chat"


def _write(path: Path, found: _Found) -> None:
    """Write rows into a new store; those that are not whole get no seal."""
    os.close(new_file(path))
    connection = connect(path, WAIT_S)
    try:
        connection.execute("BEGIN IMMEDIATE")
        for (table, found_columns, _, check), name in zip(found.tables(), ("chats", "turns", "drafts"), strict=True):
            columns = [column for column in found_columns if column != "row"]
            insert = f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            for row in sorted(table.values(), key=lambda r: (r.get("row") is None, r.get("row") or 0)):
                kept = row if check(row) else {**row, "seal": rows.BROKEN}
                connection.execute(insert, [EMPTY.get(c) if kept[c] is None else whole_text(kept[c]) for c in columns])
        connection.execute("COMMIT")
    finally:
        connection.close()


def beside(path: Path, end: str) -> Path:
    """A file beside another one whose name goes on with ``end``."""
    return path.with_name(f"{path.name}{end}")


def _remove(path: Path) -> None:
    for end in ("", *LOGS):
        beside(path, end).unlink(missing_ok=True)
