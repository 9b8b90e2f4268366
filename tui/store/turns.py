"""Turns of a chat: save and load."""

from __future__ import annotations

import json

from ring_mlx import whole_text
from tui.store import rows
from tui.store.attachments import packed, unpacked
from tui.store.database import Database, Statement
from tui.store.records import ASSISTANT, USER, Call, Record, Turn


def saving(chat_id: str, turn: Turn) -> Statement:
    """The statement that saves a turn; saving it again replaces what was written so far."""
    record = json.dumps(turn.record.as_dict()) if turn.record else None
    calls = json.dumps([[c.name, c.arguments] for c in turn.calls])
    said = (turn.id, chat_id, turn.parent, turn.role, turn.content, turn.thinking, calls, record)
    values = (*map(whole_text, said), float(turn.created), packed(turn.attachments))
    return rows.TURNS.saving(dict(zip(rows.TURNS.content, values, strict=True)), turn.is_damaged)


def load(db: Database, chat_id: str) -> list[Turn]:
    """All turns of a chat, in the order in which they were first saved; damaged ones say so."""
    columns = rows.TURNS.columns
    found = db.read(f"SELECT {', '.join(columns)} FROM turns WHERE chat = ? ORDER BY row", (chat_id,))
    return [from_row(dict(zip(columns, row, strict=True))) for row in found]


def exchange(db: Database, chat_id: str, turn_id: str) -> list[Turn]:
    """A turn's question and its answer, of a question's the latest one, as far as there are such; none if it is gone."""
    columns = ", ".join(rows.TURNS.columns)

    def read(condition: str, value: str | None) -> list[Turn]:
        sql = f"SELECT {columns} FROM turns WHERE chat = ? AND {condition} ORDER BY row DESC LIMIT 1"
        return [from_row(row) for row in db.read(sql, (chat_id, value))]

    found = read("id = ?", turn_id)
    if not found:
        return []
    if found[0].role == USER:
        return [*found, *read("parent = ?", turn_id)]
    return [*read("id = ?", found[0].parent), *found]


def recent_questions(db: Database, limit: int = 200) -> list[str]:
    """Recent questions of all chats, the oldest first, without damaged ones."""
    columns = ", ".join(name for name in rows.TURNS.columns if name != "attachments")
    sql = f"SELECT {columns} FROM turns WHERE role = 'user' AND content != '' ORDER BY row DESC LIMIT ?"
    return [rows.text(row["content"]) for row in db.read(sql, (limit,)) if rows.TURNS.is_sound(row)][::-1]


def from_row(row: rows.Row) -> Turn:
    """The turn of a row, marked as damaged if it is; what cannot be unpacked is kept as text."""
    turn = Turn(
        role=USER if row["role"] == USER else ASSISTANT,
        content=rows.text(row["content"]),
        parent=None if row["parent"] is None else rows.text(row["parent"]),
        thinking=rows.text(row["thinking"]),
        id=rows.text(row["id"]),
        created=rows.number(row["created"]),
        is_damaged=row["role"] not in (USER, ASSISTANT) or not rows.TURNS.is_whole(row),
    )
    turn.attachments, is_readable = unpacked(row["attachments"])
    turn.is_damaged = turn.is_damaged or not is_readable
    try:
        turn.calls = tuple(Call(str(name), dict(given)) for name, given in rows.unpacked(row["calls"]))
    except (ValueError, TypeError):
        turn.calls, turn.is_damaged = (Call(rows.MARK, {"text": rows.text(row["calls"])}),), True
    try:
        turn.record = None if row["record"] is None else Record.from_dict(dict(rows.unpacked(row["record"])))
    except (ValueError, TypeError):
        turn.is_damaged = True
    return turn
