"""Turns of a chat: save and load; knows no tree, only parents."""

from __future__ import annotations

import json
import sqlite3

from tui.store.database import Database, Statement
from tui.store.records import Attachment, Call, Record, Turn


def saving(chat_id: str, turn: Turn) -> Statement:
    """The statement that saves a turn; saving it again replaces what was written so far."""
    sql = """
        INSERT INTO turns (id, chat, parent, role, content, thinking, attachments, calls, record, created)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET
          content = excluded.content, thinking = excluded.thinking, attachments = excluded.attachments,
          calls = excluded.calls, record = excluded.record"""
    attachments = json.dumps([[a.name, a.text] for a in turn.attachments])
    calls = json.dumps([[c.name, c.arguments] for c in turn.calls])
    record = json.dumps(turn.record.as_dict()) if turn.record else None
    values = (turn.id, chat_id, turn.parent, turn.role, turn.content, turn.thinking, attachments, calls, record)
    return sql, tuple(
        v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in (*values, turn.created)
    )


def save(db: Database, chat_id: str, turn: Turn) -> None:
    """Save a turn of a chat that has been saved."""
    db.write(saving(chat_id, turn))


def load(db: Database, chat_id: str) -> list[Turn]:
    """All turns of a chat, in the order in which they were first saved."""
    return [_turn(row) for row in db.read("SELECT * FROM turns WHERE chat = ? ORDER BY row", (chat_id,))]


def recent_questions(db: Database, limit: int = 200) -> list[str]:
    """What was asked lately in any chat, the oldest first."""
    sql = "SELECT content FROM turns WHERE role = 'user' AND content != '' ORDER BY row DESC LIMIT ?"
    return [str(row["content"]) for row in db.read(sql, (limit,))][::-1]


def _turn(row: sqlite3.Row) -> Turn:
    return Turn(
        role=row["role"],
        content=row["content"],
        parent=row["parent"],
        thinking=row["thinking"],
        attachments=tuple(Attachment(name, text) for name, text in json.loads(row["attachments"])),
        calls=tuple(Call(name, arguments) for name, arguments in json.loads(row["calls"])),
        record=Record.from_dict(json.loads(row["record"])) if row["record"] else None,
        id=row["id"],
        created=row["created"],
    )
