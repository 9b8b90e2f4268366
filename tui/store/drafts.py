"""What was typed in a chat and not sent."""

from __future__ import annotations

from tui.store.database import Database, Statement


def saving(chat_id: str, content: str) -> Statement:
    """The statement that keeps a draft, or forgets it where it is empty."""
    if not content:
        return "DELETE FROM drafts WHERE chat = ?", (chat_id,)
    return (
        "INSERT INTO drafts (chat, content) VALUES (?, ?) ON CONFLICT (chat) DO UPDATE SET content = excluded.content",
        (chat_id, content),
    )


def load(db: Database, chat_id: str) -> str:
    """The draft of a chat, or nothing."""
    rows = db.read("SELECT content FROM drafts WHERE chat = ?", (chat_id,))
    return str(rows[0]["content"]) if rows else ""
