"""Keeps chats on disk while they are talked: writes, and where that fails keeps them in memory and tries again.

Knows the store, no screen. Reads go to the store too, which is one in memory where the file cannot be opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tui.conversation import Conversation
from tui.store import Database, StoreError, Turn, chats, drafts, turns
from tui.store.database import Statement

WRITE_EVERY_S, RETRY_EVERY_S = 0.25, 2.0
COST = 20  # the time between two writes of a growing answer, in times of what a write takes


class Keeper:
    """The store of the running chat.

    Args:
        path: The file, or None for memory only.
        tell: Shows one line to the user; each trouble is told once, until something could be written again.
        clock: Seconds, from any start.
    """

    def __init__(
        self, path: Path | None, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._clock = tell, clock
        self._waiting: dict[str, Callable[[], Statement]] = {}
        self._wrote_at = self._tried_at = float("-inf")
        self._trouble, self._took_s = "", 0.0
        try:
            self.db = Database(path)
            chats.purge(self.db)
        except StoreError as e:
            self.db = Database(None)
            tell(str(e))

    def tell_with(self, tell: Callable[[str], None]) -> None:
        """Show lines in another way from now on."""
        self._tell = tell

    @property
    def unsaved(self) -> int:
        """How many changes are only in memory."""
        return len(self._waiting)

    def open(self, chat_id: str) -> Conversation | None:
        """A chat of the store."""
        chat = chats.load(self.db, chat_id)
        return Conversation(chat, turns.load(self.db, chat_id)) if chat else None

    def latest(self) -> Conversation | None:
        """The chat changed last."""
        found = sorted(chats.listed(self.db), key=lambda c: c.changed)
        return self.open(found[-1].id) if found else None

    def recent_questions(self) -> list[str]:
        """What was asked lately in all chats, the oldest first."""
        try:
            return turns.recent_questions(self.db)
        except StoreError:
            return []

    def keep(self, talk: Conversation, *changed: Turn) -> None:
        """Write a chat and its changed turns, now or when it is possible again; an empty chat is not kept."""
        if talk.turns:
            chat_id = talk.chat.id
            self._waiting[f"0 {chat_id}"] = lambda: chats.saving(talk.chat)
            for turn in changed:
                self._waiting[f"1 {turn.id}"] = lambda turn=turn: turns.saving(chat_id, turn)  # type: ignore[misc]
            self.flush()

    def keep_growing(self, talk: Conversation, turn: Turn) -> None:
        """As `keep`, for an answer being written: each time if that is cheap, at least four times a second."""
        if self._clock() - self._wrote_at >= min(WRITE_EVERY_S, COST * self._took_s):
            self.keep(talk, turn)

    def rename(self, talk: Conversation, title: str) -> None:
        """Give a chat another title."""
        talk.chat.title = title
        self._waiting[f"3 {talk.chat.id}"] = lambda: chats.renaming(talk.chat.id, title)
        self.keep(talk)

    def pin(self, talk: Conversation, pinned: bool) -> None:
        """Keep a chat at the top of the list, or no longer."""
        talk.chat.pinned = pinned
        self._waiting[f"4 {talk.chat.id}"] = lambda: chats.pinning(talk.chat.id, pinned)
        self.keep(talk)

    def forget(self, turn: Turn) -> None:
        """Remove a turn that was taken back."""
        self._waiting[f"1 {turn.id}"] = lambda: ("DELETE FROM turns WHERE id = ?", (turn.id,))

    def keep_draft(self, chat_id: str, content: str) -> None:
        """Write what is typed and not sent."""
        self._waiting[f"2 {chat_id}"] = lambda: drafts.saving(chat_id, content)
        self.flush()

    def flush(self, is_last: bool = False) -> bool:
        """Write what waits; after a failure only every few seconds. Returns whether nothing waits any more."""
        if not self._waiting:
            return True
        if self._trouble and not is_last and self._clock() - self._tried_at < RETRY_EVERY_S:
            return False
        self._tried_at = self._clock()
        try:
            self.db.write(*(self._waiting[key]() for key in sorted(self._waiting)), tries=4 if is_last else 1)
        except StoreError as e:
            if str(e) != self._trouble:
                self._trouble = str(e)
                self._tell(self._trouble)
            return False
        self._waiting.clear()
        self._trouble, self._wrote_at = "", self._clock()
        self._took_s = self._wrote_at - self._tried_at
        return True

    def close(self) -> bool:
        """Write what waits and close; returns whether everything is on disk."""
        is_done = self.flush(is_last=True)
        self.db.close()
        return is_done
