"""What changes about a chat apart from its turns: title, pin, settings, and whether it is deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from tui.conversation import Conversation
from tui.store import Database, StoreError, Turn, chats, settings
from tui.store.database import Change, Statement

Waiting = dict[str, Callable[[], Statement | Change]]


class ChatChanges:
    """A part of `tui.keeper.Keeper`, which writes what waits."""

    db: Database
    _waiting: Waiting
    _standing_in: Waiting  # what only a store in memory holds
    _changed_settings: dict[str, dict[str, Any]]  # by chat: those that wait

    def keep(self, talk: Conversation, *changed: Turn) -> None:
        raise NotImplementedError

    def flush(self, is_last: bool = False) -> bool:
        raise NotImplementedError

    def rename(self, talk: Conversation, title: str) -> None:
        talk.chat.title = title
        self._waiting[f"3 {talk.chat.id}"] = lambda: chats.renaming(talk.chat.id, title)
        self.keep(talk)

    def pin(self, talk: Conversation, pinned: bool) -> None:
        talk.chat.pinned = pinned
        self._waiting[f"4 {talk.chat.id}"] = lambda: chats.pinning(talk.chat.id, pinned)
        self.keep(talk)

    def is_deleted(self, talk: Conversation) -> bool:
        """Whether a chat with turns has been deleted, perhaps in another window."""
        try:
            found = chats.load(self.db, talk.chat.id) if talk.turns else None
        except StoreError:
            return False
        return found is not None and found.deleted is not None

    def bring_back(self, talk: Conversation) -> None:
        """Take back that a chat was deleted."""
        self._waiting[f"4 {talk.chat.id} deleted"] = lambda: chats.restoring(talk.chat.id)
        self.flush()

    def distinct_title(self, talk: Conversation) -> str:
        """The title of a chat, with a number if another chat has the same."""
        try:
            return chats.distinct(self.db, talk.chat)
        except StoreError:
            return talk.chat.title

    def entitle(self, talk: Conversation, title: str) -> None:
        """Give a chat a title that is not the user's; one that the user gave in another window stays."""
        talk.chat.title = title
        talk.chat.title = title = self.distinct_title(talk)
        self._waiting[f"3 {talk.chat.id}"] = lambda: chats.entitling(talk.chat.id, title)
        if self.flush():
            with contextlib.suppress(StoreError):
                found = chats.load(self.db, talk.chat.id)
                talk.chat.title = found.title if found else title

    def keep_settings(self, talk: Conversation, changed: Mapping[str, Any]) -> None:
        """Change settings of a chat; they are written with the chat, once it has a turn or a draft."""
        chat, key = talk.chat, f"5 {talk.chat.id}"
        chat.settings = {**chat.settings, **changed}
        earlier = self._changed_settings[chat.id] if key in self._waiting | self._standing_in else {}
        self._changed_settings[chat.id] = new = {**earlier, **changed}
        self._waiting[key] = lambda: settings.changing(chat.id, new)
        self.keep(talk)

    def refresh_settings(self, talk: Conversation) -> dict[str, Any]:
        """Take over what another window has set in a chat; returns the settings that are kept."""
        chat = talk.chat
        if f"5 {chat.id}" in self._waiting | self._standing_in:
            return chat.settings
        found: dict[str, Any] = {}
        with contextlib.suppress(StoreError):
            found, chat.are_settings_damaged = settings.load(self.db, chat.id)
        chat.settings = {**chat.settings, **found}
        return found
