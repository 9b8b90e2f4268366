"""Chats: save, list, rename, pin, delete and restore."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable

from ring_mlx import whole_text
from tui.store import drafts, rows, settings
from tui.store.database import Change, Database, Statement
from tui.store.records import Chat

KEEP_DELETED_S = 30 * 24 * 3600.0
DRAFT_CHARACTERS = 48  # that stand for a title


def saving(chat: Chat) -> Change:
    """The change that saves a chat.

    One that is there keeps its title, unless it had none, and whether it is pinned or deleted: another window may have
    changed them, so only `renaming`, `pinning`, `deleting` and `restoring` do.
    """

    def save(connection: sqlite3.Connection) -> None:
        found = _read(connection, chat.id)
        if found is None:
            _write(connection, chat)
        else:
            found.title, found.leaf, found.changed = found.title or chat.title, chat.leaf, chat.changed
            _write(connection, found)

    return save


def load(db: Database, chat_id: str) -> Chat | None:
    """The chat of this id, deleted or not, with its settings."""
    found = db.read(_select("c.id = ?"), (chat_id,))
    if not found:
        return None
    chat = from_row(found[0])
    chat.settings, chat.are_settings_damaged = settings.load(db, chat_id)
    return chat


def listed(db: Database, limit: int = 1000) -> list[Chat]:
    """The chats with turns or a draft that are not deleted: pinned ones first, then the latest."""
    used = "(EXISTS (SELECT 1 FROM turns t WHERE t.chat = c.id) OR EXISTS (SELECT 1 FROM drafts d WHERE d.chat = c.id))"
    sql = _select(f"c.deleted IS NULL AND {used}") + " ORDER BY c.pinned DESC, c.changed DESC LIMIT ?"
    found = [from_row(row) for row in db.read(sql, (limit,))]
    for chat in found:
        if not (chat.turns or chat.title):
            chat.title = f"draft: {' '.join(drafts.load(db, chat.id).split())[:DRAFT_CHARACTERS]}"
    return found + [chat for chat in _with_deletion(db) if chat.turns and chat.deleted is None]


def is_called(title: str, words: str) -> bool:
    """Whether all words are in a title."""
    return all(word in title.lower() for word in words.lower().split())


def saving_draft(chat: Chat, content: str) -> Change | Statement:
    """The change that saves a chat without turns, which is there as long as it has a draft."""
    if content:
        return saving(chat)
    return "DELETE FROM chats WHERE id = ? AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.chat = chats.id)", (chat.id,)


def deleted_ids(db: Database) -> list[str]:
    """The chats that are certainly deleted; damaged ones are not."""
    return [chat.id for chat in _with_deletion(db) if chat.deleted is not None]


def renaming(chat_id: str, title: str) -> Change:
    """The change that gives a chat the title that the user wants."""
    mark = settings.changing(chat_id, {}, named=True)
    rename = _changing(chat_id, lambda chat: setattr(chat, "title", title))

    def write(connection: sqlite3.Connection) -> None:
        rename(connection)
        mark(connection)

    return write


def entitling(chat_id: str, title: str) -> Change:
    """The change that gives a chat a title that is not the user's, unless the user has named it, in any window."""
    rename = _changing(chat_id, lambda chat: setattr(chat, "title", title))
    return lambda connection: None if settings.is_named(connection, chat_id) else rename(connection)


def distinct(db: Database, chat: Chat) -> str:
    """The title of a chat, with a number if another chat has the same."""
    sql = "SELECT title FROM chats WHERE id != ? AND deleted IS NULL AND substr(title, 1, ?) = ?"
    taken = {rows.text(row["title"]) for row in db.read(sql, (chat.id, len(chat.title), chat.title))}
    if chat.title not in taken:
        return chat.title
    return next(found for n in itertools.count(2) if (found := f"{chat.title} ({n})") not in taken)


def pinning(chat_id: str, pinned: bool) -> Change:
    """The change that keeps a chat at the top, or no longer."""
    return _changing(chat_id, lambda chat: setattr(chat, "pinned", pinned))


def deleting(chat_id: str) -> Change:
    """The change that takes a chat out of lists and searches; `restoring` brings it back for a month."""
    return _changing(chat_id, lambda chat: setattr(chat, "deleted", time.time()))


def restoring(chat_id: str) -> Change:
    """The change that brings a deleted chat back."""
    return _changing(chat_id, lambda chat: setattr(chat, "deleted", None))


def purge(db: Database, older_than_s: float = KEEP_DELETED_S) -> None:
    """Remove chats for good that were certainly deleted so long ago."""
    old = db.read(_select("c.deleted < ?"), (time.time() - older_than_s,))
    gone = [chat.id for chat in map(from_row, old) if chat.deleted is not None]
    if gone:
        db.write(*(("DELETE FROM chats WHERE id = ?", (chat_id,)) for chat_id in gone))
        db.write(*(change for chat_id in gone for change in drafts.removing(chat_id)))


def from_row(row: rows.Row) -> Chat:
    """The chat of a row; the title of a damaged one is marked, and it is not taken for deleted."""
    is_whole = rows.CHATS.is_whole(row)
    title = rows.text(row["title"])
    return Chat(
        title=title if is_whole else rows.marked(title),
        leaf=None if row["leaf"] is None else rows.text(row["leaf"]),
        pinned=bool(row["pinned"]),
        deleted=rows.number(row["deleted"]) if is_whole and row["deleted"] is not None else None,
        turns=row["turns"],
        id=rows.text(row["id"]),
        created=rows.number(row["created"]),
        changed=rows.number(row["changed"]),
    )


def _with_deletion(db: Database) -> list[Chat]:
    return [from_row(row) for row in db.read(_select("c.deleted IS NOT NULL"))]


def _changing(chat_id: str, change: Callable[[Chat], None]) -> Change:
    """The change of a chat, if it is there."""

    def write(connection: sqlite3.Connection) -> None:
        if (chat := _read(connection, chat_id)) is not None:
            change(chat)
            _write(connection, chat)

    return write


def _read(connection: sqlite3.Connection, chat_id: str) -> Chat | None:
    row = connection.execute(
        f"SELECT {', '.join(rows.CHATS.columns)}, 0 turns FROM chats WHERE id = ?", (chat_id,)
    ).fetchone()
    return from_row(row) if row else None


def _write(connection: sqlite3.Connection, chat: Chat) -> None:
    values = [whole_text(v) for v in (chat.id, chat.title, chat.leaf, int(chat.pinned), chat.deleted)]
    values += [float(chat.created), float(chat.changed)]
    connection.execute(*rows.CHATS.saving(dict(zip(rows.CHATS.content, values, strict=True))))


def _select(condition: str) -> str:
    columns = ", ".join(f"c.{name}" for name in rows.CHATS.columns)
    return f"SELECT {columns}, (SELECT count(*) FROM turns t WHERE t.chat = c.id) turns FROM chats c WHERE {condition}"
