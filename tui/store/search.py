"""Search over everything said in all chats.

Words are prefixes and all must occur; the index splits at spaces and punctuation. Chinese, Japanese and Korean have
no spaces to split at, so a search in them reads the turns instead.
"""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass

from tui.store import chats, rows
from tui.store.database import Database

OPEN, CLOSE = "\ue000", "\ue001"  # private characters around a hit, which no tokenizer of the index makes
LIMIT, SNIPPET_WORDS, AROUND = 60, 14, 40
_COLUMNS = ", ".join(
    [f"t.{name}" for name in rows.TURNS.columns if name != "attachments"]
    + [f"c.{name} chat_{name}" for name in rows.CHATS.columns]
)
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class Hit:
    """A turn in which the words occur; ``snippet`` has `OPEN` and `CLOSE` around each, and a mark if it is damaged."""

    chat: str
    title: str
    turn: str
    role: str
    snippet: str


def find(db: Database, text: str, limit: int = LIMIT) -> list[Hit]:
    """The best hits, the best first, in chats that are not deleted.

    Args:
        db: The store.
        text: Words as typed; punctuation does not matter.
        limit: At most so many.

    Raises:
        StoreError: If the store cannot be read.
    """
    gone = json.dumps(chats.deleted_ids(db))
    if _UNSPACED.search(text):
        return _read_all(db, text.strip(), gone, limit)
    words = re.findall(r"\w+", text)
    if not words:
        return []
    sql = f"""
        SELECT {_COLUMNS}, snippet(found, 0, ?, ?, '…', ?) snippet
        FROM found JOIN turns t ON t.row = found.rowid JOIN chats c ON c.id = t.chat
        WHERE found MATCH ? AND c.id NOT IN (SELECT value FROM json_each(?)) ORDER BY found.rank LIMIT ?"""
    query = " ".join(f'"{word}"*' for word in words)
    values = (OPEN, CLOSE, SNIPPET_WORDS, query, gone, limit)
    found = db.read(sql, values)
    if not found and db.mend_index():  # the index of a large store is not checked when it is opened
        found = db.read(sql, values)
    return [_hit(row, rows.text(row["snippet"])) for row in found]


def _read_all(db: Database, text: str, gone: str, limit: int) -> list[Hit]:
    sql = f"""
        SELECT {_COLUMNS}, substr(t.content, max(1, instr(t.content, ?) - ?), length(?) + 2 * ?) snippet
        FROM turns t JOIN chats c ON c.id = t.chat
        WHERE instr(t.content, ?) AND c.id NOT IN (SELECT value FROM json_each(?)) ORDER BY t.created DESC LIMIT ?"""
    found = db.read(sql, (text, AROUND, text, AROUND, text, gone, limit))
    return [_hit(row, rows.text(row["snippet"]).replace(text, f"{OPEN}{text}{CLOSE}")) for row in found]


def _hit(row: sqlite3.Row, snippet: str) -> Hit:
    title, snippet = rows.text(row["chat_title"]), " ".join(snippet.split())
    is_title_whole = rows.CHATS.is_whole({name: row[f"chat_{name}"] for name in rows.CHATS.columns})
    return Hit(
        chat=rows.text(row["chat"]),
        title=title if is_title_whole else rows.marked(title),
        turn=rows.text(row["id"]),
        role=rows.text(row["role"]),
        snippet=snippet if rows.TURNS.is_sound(row) else rows.marked(snippet),
    )
