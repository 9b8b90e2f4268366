"""Chats: save, list, rename, pin, delete and restore; knows no turn."""

from __future__ import annotations

import sqlite3
import time

from tui.store.database import Database, Statement
from tui.store.records import Chat

KEEP_DELETED_S = 30 * 24 * 3600.0
_COLUMNS = "id, title, leaf, pinned, deleted, created, changed"


def saving(chat: Chat) -> Statement:
    """The statement that saves a chat.

    One that is there keeps its title, unless it had none, and whether it is pinned or deleted: another window may have
    changed them, so only `renaming`, `pinning`, `delete` and `restore` do.
    """
    sql = f"""
        INSERT INTO chats ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET
          title = CASE title WHEN '' THEN excluded.title ELSE title END, leaf = excluded.leaf,
          changed = excluded.changed"""
    return sql, (chat.id, chat.title, chat.leaf, int(chat.pinned), chat.deleted, chat.created, chat.changed)


def save(db: Database, chat: Chat) -> None:
    """Save a chat."""
    db.write(saving(chat))


def load(db: Database, chat_id: str) -> Chat | None:
    """The chat of this id, deleted or not."""
    rows = db.read(_select("c.id = ?"), (chat_id,))
    return _chat(rows[0]) if rows else None


def listed(db: Database, limit: int = 1000) -> list[Chat]:
    """The chats in which something was said and that are not deleted: pinned ones first, then the latest."""
    sql = (
        _select("c.deleted IS NULL AND EXISTS (SELECT 1 FROM turns t WHERE t.chat = c.id)")
        + " ORDER BY c.pinned DESC, c.changed DESC LIMIT ?"
    )
    return [_chat(row) for row in db.read(sql, (limit,))]


def renaming(chat_id: str, title: str) -> Statement:
    """The statement that gives a chat another title."""
    return "UPDATE chats SET title = ? WHERE id = ?", (title, chat_id)


def pinning(chat_id: str, pinned: bool) -> Statement:
    """The statement that keeps a chat at the top, or no longer."""
    return "UPDATE chats SET pinned = ? WHERE id = ?", (int(pinned), chat_id)


def rename(db: Database, chat_id: str, title: str) -> None:
    """Give a chat another title."""
    db.write(renaming(chat_id, title))


def pin(db: Database, chat_id: str, pinned: bool) -> None:
    """Keep a chat at the top, or no longer."""
    db.write(pinning(chat_id, pinned))


def delete(db: Database, chat_id: str) -> None:
    """Take a chat out of lists and searches; `restore` brings it back for a month."""
    db.write(("UPDATE chats SET deleted = ? WHERE id = ?", (time.time(), chat_id)))


def restore(db: Database, chat_id: str) -> None:
    """Bring a deleted chat back."""
    db.write(("UPDATE chats SET deleted = NULL WHERE id = ?", (chat_id,)))


def purge(db: Database, older_than_s: float = KEEP_DELETED_S) -> None:
    """Remove for good what was deleted so long ago."""
    db.write(("DELETE FROM chats WHERE deleted < ?", (time.time() - older_than_s,)))


def _select(condition: str) -> str:
    columns = ", ".join(f"c.{name}" for name in _COLUMNS.split(", "))
    return f"SELECT {columns}, (SELECT count(*) FROM turns t WHERE t.chat = c.id) turns FROM chats c WHERE {condition}"


def _chat(row: sqlite3.Row) -> Chat:
    return Chat(**{**dict(row), "pinned": bool(row["pinned"])})
