"""Settings of a chat's own, and whether the user has named it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from ring_mlx import whole_text
from tui.store import rows
from tui.store.database import Change, Database

_SELECT = f"SELECT {', '.join(rows.SETTINGS.columns)} FROM settings WHERE chat = ?"


def changing(chat_id: str, changed: Mapping[str, Any], named: bool = False) -> Change:
    """The change of some settings of a chat that is there; others, which another window may have changed, stay.

    Damaged ones stay marked until all of them are given.
    """

    def write(connection: sqlite3.Connection) -> None:
        if connection.execute("SELECT 1 FROM chats WHERE id = ?", (chat_id,)).fetchone() is None:
            return
        found = connection.execute(_SELECT, (chat_id,)).fetchone()
        kept, is_damaged = _content(found) if found else ({}, False)
        is_damaged = is_damaged and not kept.keys() <= changed.keys()
        row = {
            "chat": chat_id,
            "content": json.dumps(whole_text({**kept, **changed})),
            "named": int(named or bool(found and found["named"])),
        }
        connection.execute(*rows.SETTINGS.saving(row, is_damaged))

    return write


def load(db: Database, chat_id: str) -> tuple[dict[str, Any], bool]:
    """The settings of a chat, and whether they are damaged; what cannot be read of those is left out."""
    found = db.read(_SELECT, (chat_id,))
    return _content(found[0]) if found else ({}, False)


def is_named(connection: sqlite3.Connection, chat_id: str) -> bool:
    """Whether the user has named a chat; of damaged rows that is not certain, so they say yes."""
    found = connection.execute(_SELECT, (chat_id,)).fetchone()
    return bool(found) and (bool(found["named"]) or not rows.SETTINGS.is_whole(found))


def _content(row: rows.Row) -> tuple[dict[str, Any], bool]:
    is_damaged = not rows.SETTINGS.is_whole(row)
    try:
        return dict(rows.unpacked(row["content"])), is_damaged
    except (ValueError, TypeError):
        return {}, True
