"""Chats on disk: SQLite with full-text search, one module per concern.

``records`` has the stored values, ``database`` owns the file and its failures, ``migrations`` its versions; ``chats``,
``turns``, ``drafts``, ``search`` and ``exchange`` are functions of a `Database`.
"""

from tui.store.database import Database
from tui.store.failures import StoreError
from tui.store.records import Attachment, Call, Chat, Record, Turn

__all__ = ["Attachment", "Call", "Chat", "Database", "Record", "StoreError", "Turn"]
