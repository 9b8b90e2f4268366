"""Drafts: text typed in a chat and not sent, and what is attached to it.

The attachments are in a row of their own, so that they are not written with every letter.
"""

from __future__ import annotations

from collections.abc import Iterable

from ring_mlx import whole_text
from tui.store import rows
from tui.store.attachments import packed, unpacked
from tui.store.database import Database, Statement
from tui.store.records import Attachment

ATTACHED = "{} attachments"  # the key of the row beside that of a chat


def saving(chat_id: str, content: str) -> Statement:
    """The statement that keeps a draft, or removes an empty one."""
    if not content:
        return "DELETE FROM drafts WHERE chat = ?", (chat_id,)
    return rows.DRAFTS.saving({"chat": chat_id, "content": whole_text(content)})


def saving_attachments(chat_id: str, attachments: Iterable[Attachment]) -> Statement:
    """The statement that keeps a draft's attachments, or removes them if there are none now."""
    found = tuple(attachments)
    return saving(ATTACHED.format(chat_id), packed(found) if found else "")


def removing(chat_id: str) -> list[Statement]:
    """The statements that remove a draft and its attachments."""
    return [saving(chat_id, ""), saving_attachments(chat_id, ())]


def load(db: Database, chat_id: str) -> str:
    """The draft of a chat, marked if it is damaged, or nothing."""
    content, is_whole = _read(db, chat_id)
    return content if is_whole else rows.marked(content)


def load_attachments(db: Database, chat_id: str) -> list[Attachment]:
    """The attachments of a chat's draft; the names of damaged ones are marked."""
    content, is_whole = _read(db, ATTACHED.format(chat_id))
    found = unpacked(content or "[]")[0]
    return [a if is_whole else Attachment(rows.marked(a.name), a.text) for a in found]


def _read(db: Database, key: str) -> tuple[str, bool]:
    found = db.read("SELECT chat, content, seal FROM drafts WHERE chat = ?", (key,))
    return (rows.text(found[0]["content"]), rows.DRAFTS.is_whole(found[0])) if found else ("", True)
