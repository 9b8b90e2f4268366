"""Drafts: text typed in a chat and not sent."""

from __future__ import annotations

from ring_mlx import whole_text
from tui.store import rows, seals
from tui.store.database import Database, Statement


def saving(chat_id: str, content: str) -> Statement:
    """The statement that keeps a draft, or forgets it where it is empty."""
    if not content:
        return "DELETE FROM drafts WHERE chat = ?", (chat_id,)
    row = {"chat": chat_id, "content": whole_text(content)}
    return "INSERT OR REPLACE INTO drafts (chat, content, seal) VALUES (?, ?, ?)", (*row.values(), seals.of_draft(row))


def load(db: Database, chat_id: str) -> str:
    """The draft of a chat, marked if it is damaged, or nothing."""
    found = db.read("SELECT chat, content, seal FROM drafts WHERE chat = ?", (chat_id,))
    if not found:
        return ""
    content = rows.text(found[0]["content"])
    return content if seals.is_whole_draft(found[0]) else rows.marked(content)
