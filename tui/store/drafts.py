"""Drafts: text typed in a chat and not sent."""

from __future__ import annotations

from ring_mlx import whole_text
from tui.store import rows
from tui.store.database import Database, Statement


def saving(chat_id: str, content: str) -> Statement:
    """The statement that keeps a draft, or removes an empty one."""
    if not content:
        return "DELETE FROM drafts WHERE chat = ?", (chat_id,)
    return rows.DRAFTS.saving({"chat": chat_id, "content": whole_text(content)})


def load(db: Database, chat_id: str) -> str:
    """The draft of a chat, marked if it is damaged, or nothing."""
    found = db.read("SELECT chat, content, seal FROM drafts WHERE chat = ?", (chat_id,))
    if not found:
        return ""
    content = rows.text(found[0]["content"])
    return content if rows.DRAFTS.is_whole(found[0]) else rows.marked(content)
