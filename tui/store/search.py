"""Search over everything said in all chats; knows words, not screens.

Words are prefixes and all must occur; the index splits at spaces and punctuation. Chinese, Japanese and Korean have
no spaces to split at, so a search in them reads the turns instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tui.store.database import Database

OPEN, CLOSE = "\ue000", "\ue001"  # private characters around a hit, which no tokenizer of the index makes
LIMIT, SNIPPET_WORDS, AROUND = 60, 14, 40
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True)
class Hit:
    """A turn in which the words occur; ``snippet`` has `OPEN` and `CLOSE` around each."""

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
    if _UNSPACED.search(text):
        return _read_all(db, text.strip(), limit)
    words = re.findall(r"\w+", text)
    if not words:
        return []
    sql = """
        SELECT c.id chat, c.title, t.id turn, t.role,
          replace(replace(snippet(found, 0, ?, ?, '…', ?), char(10), ' '), char(9), ' ') snippet
        FROM found JOIN turns t ON t.row = found.rowid JOIN chats c ON c.id = t.chat
        WHERE found MATCH ? AND c.deleted IS NULL ORDER BY found.rank LIMIT ?"""
    query = " ".join(f'"{word}"*' for word in words)
    return [Hit(**dict(row)) for row in db.read(sql, (OPEN, CLOSE, SNIPPET_WORDS, query, limit))]


def _read_all(db: Database, text: str, limit: int) -> list[Hit]:
    sql = """
        SELECT c.id chat, c.title, t.id turn, t.role,
          substr(t.content, max(1, instr(t.content, ?) - ?), length(?) + 2 * ?) snippet
        FROM turns t JOIN chats c ON c.id = t.chat
        WHERE instr(t.content, ?) AND c.deleted IS NULL ORDER BY t.created DESC LIMIT ?"""
    rows = [dict(row) for row in db.read(sql, (text, AROUND, text, AROUND, text, limit))]
    marked = f"{OPEN}{text}{CLOSE}"
    return [Hit(**{**row, "snippet": " ".join(row["snippet"].split()).replace(text, marked)}) for row in rows]
