"""Attachments in a column."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tui.store import rows
from tui.store.records import Attachment


def packed(attachments: Iterable[Attachment]) -> str:
    """The text of a column."""
    return json.dumps([[a.name, a.text] for a in attachments])


def unpacked(value: object) -> tuple[tuple[Attachment, ...], bool]:
    """The attachments of a column, and whether it could be read; if not, its text is the one attachment."""
    try:
        return tuple(Attachment(str(name), str(text)) for name, text in rows.unpacked(value)), True
    except (ValueError, TypeError):
        return (Attachment(rows.MARK, rows.text(value)),), False
