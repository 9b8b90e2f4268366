"""Turns of a chat: save and load."""

from __future__ import annotations

import json

from ring_mlx import whole_text
from tui.store import rows, seals
from tui.store.database import Database, Statement
from tui.store.records import ASSISTANT, USER, Attachment, Call, Record, Turn

_COLUMNS = (*seals.TURN, "attachments", "seal")
_SAVE = f"""
    INSERT INTO turns ({", ".join(_COLUMNS)}) VALUES ({", ".join("?" * len(_COLUMNS))})
    ON CONFLICT (id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[1:])}"""


def saving(chat_id: str, turn: Turn) -> Statement:
    """The statement that saves a turn; saving it again replaces what was written so far."""
    record = json.dumps(turn.record.as_dict()) if turn.record else None
    calls = json.dumps([[c.name, c.arguments] for c in turn.calls])
    attachments = json.dumps([[a.name, a.text] for a in turn.attachments])
    said = (turn.id, chat_id, turn.parent, turn.role, turn.content, turn.thinking, calls, record)
    row = dict(zip(seals.TURN, (*map(whole_text, said), float(turn.created)), strict=True), attachments=attachments)
    return _SAVE, (*row.values(), rows.BROKEN if turn.is_damaged else seals.of_turn(row))


def save(db: Database, chat_id: str, turn: Turn) -> None:
    """Save a turn of a chat that has been saved."""
    db.write(saving(chat_id, turn))


def load(db: Database, chat_id: str) -> list[Turn]:
    """All turns of a chat, in the order in which they were first saved; damaged ones say so."""
    found = db.read(f"SELECT {', '.join(_COLUMNS)} FROM turns WHERE chat = ? ORDER BY row", (chat_id,))
    return [from_row(dict(zip(_COLUMNS, row, strict=True))) for row in found]


def recent_questions(db: Database, limit: int = 200) -> list[str]:
    """What was asked lately in any chat, the oldest first, damaged questions left out."""
    sql = f"SELECT {', '.join(seals.TURN)}, seal FROM turns WHERE role = 'user' AND content != '' ORDER BY row DESC LIMIT ?"
    return [rows.text(row["content"]) for row in db.read(sql, (limit,)) if seals.is_sound_turn(row)][::-1]


def from_row(row: seals.Row) -> Turn:
    """The turn of a row, marked as damaged if it is; what cannot be unpacked is kept as text."""
    turn = Turn(
        role=USER if row["role"] == USER else ASSISTANT,
        content=rows.text(row["content"]),
        parent=None if row["parent"] is None else rows.text(row["parent"]),
        thinking=rows.text(row["thinking"]),
        id=rows.text(row["id"]),
        created=rows.number(row["created"]),
        is_damaged=row["role"] not in (USER, ASSISTANT) or not seals.is_whole_turn(row),
    )
    try:
        turn.attachments = tuple(Attachment(str(name), str(text)) for name, text in rows.unpacked(row["attachments"]))
    except (ValueError, TypeError):
        turn.attachments, turn.is_damaged = (Attachment(rows.MARK, rows.text(row["attachments"])),), True
    try:
        turn.calls = tuple(Call(str(name), dict(given)) for name, given in rows.unpacked(row["calls"]))
    except (ValueError, TypeError):
        turn.calls, turn.is_damaged = (Call(rows.MARK, {"text": rows.text(row["calls"])}),), True
    try:
        turn.record = None if row["record"] is None else Record.from_dict(dict(rows.unpacked(row["record"])))
    except (ValueError, TypeError):
        turn.is_damaged = True
    return turn
