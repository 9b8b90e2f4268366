"""The columns of each table that the checksum covers."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Protocol

from tui.store.rows import SEAL_BYTES, fits, seal

CHAT = ("id", "title", "leaf", "pinned", "deleted", "created", "changed")
TURN = ("id", "chat", "parent", "role", "content", "thinking", "calls", "record", "created")
DRAFT = ("chat", "content")
_chat, _turn = itemgetter(*CHAT), itemgetter(*TURN)


class Row(Protocol):
    """A row of a query or a dictionary."""

    def __getitem__(self, name: str, /) -> Any: ...


def of_chat(row: Row) -> bytes:
    """The seal of a chat."""
    return seal(_chat(row))


def of_turn(row: Row) -> bytes:
    """The seal of a turn: that of what was said, then that of the attachments, which may be long."""
    return seal(_turn(row)) + seal((row["id"], row["attachments"]))


def of_draft(row: Row) -> bytes:
    """The seal of a draft."""
    return seal([row[name] for name in DRAFT])


def is_whole_chat(row: Row) -> bool:
    """Whether a chat is as it was written."""
    return fits(row["seal"], _chat(row))


def is_sound_turn(row: Row) -> bool:
    """Whether what was said is as it was written; attachments are not looked at."""
    found = row["seal"]
    return isinstance(found, bytes) and fits(found[:SEAL_BYTES], _turn(row))


def is_whole_turn(row: Row) -> bool:
    """Whether a turn is as it was written."""
    return is_sound_turn(row) and fits(row["seal"][SEAL_BYTES:], (row["id"], row["attachments"]))


def is_whole_draft(row: Row) -> bool:
    """Whether a draft is as it was written."""
    return fits(row["seal"], [row[name] for name in DRAFT])
