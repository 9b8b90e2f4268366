"""Saves chats while they grow; when that fails, keeps them in memory and tries again.

Uses the store, no screen. If the file cannot be opened, a store in memory replaces it until it can.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tui.chat_changes import ChatChanges, Waiting
from tui.conversation import Conversation
from tui.store import Attachment, Chat, Database, StoreError, Turn, chats, drafts, settings, turns
from tui.store.database import Change, Statement
from tui.store.failures import BUSY, FULL
from tui.transfer import save_elsewhere

WRITE_EVERY_S, RETRY_EVERY_S = 0.25, 2.0
COST = 20  # the time between two writes of a growing answer, in times of what a write takes
ROOM_BYTES = 32 * 1024 * 1024


class Keeper(ChatChanges):
    """The store of the running chat.

    Args:
        path: The file, or None for memory only.
        tell: Shows one line to the user; each problem is shown once, until something could be written again.
        clock: Seconds, from any start.
        make_room: Frees so many bytes of the file's disk, as far as it can; returns how many it has freed.
    """

    def __init__(
        self,
        path: Path | None,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        make_room: Callable[[int], int] = lambda nbytes: 0,
    ) -> None:
        self._path, self._tell, self._clock, self._make_room = path, tell, clock, make_room
        self._waiting: Waiting = {}
        self._standing_in: Waiting = {}  # what only a store in memory holds
        self._changed_settings: dict[str, dict[str, Any]] = {}  # by chat: those that wait
        self._talks: dict[str, Conversation] = {}
        self._talk: Conversation | None = None
        self._wrote_at = self._tried_at = float("-inf")
        self._trouble, self._took_s = "", 0.0
        self._seen: tuple[str, int, int] | None = None  # the chat, store and version of it that was caught up with last
        self._must_open = False
        try:
            self.db = self._opened()
            with contextlib.suppress(StoreError):
                chats.purge(self.db)
        except StoreError as e:
            self._stand_in()
            self._trouble, self._tried_at = str(e), self._clock()
            tell(str(e))

    def tell_with(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    @property
    def unsaved(self) -> int:
        """How many changes are only in memory."""
        return len(self._waiting | self._standing_in)

    def unsaved_turns(self) -> list[tuple[Conversation, list[Turn]]]:
        """The chats with turns that are only in memory, and those turns."""
        keys = self._waiting | self._standing_in
        found = [(talk, [t for t in talk.turns.values() if f"1 {t.id}" in keys]) for talk in self._talks.values()]
        return [(talk, unsaved) for talk, unsaved in found if unsaved]

    def open(self, chat_id: str) -> Conversation | None:
        """A chat of the store; says how much of it is damaged."""
        chat = chats.load(self.db, chat_id)
        if chat is None:
            return None
        talk = Conversation(chat, turns.load(self.db, chat_id))
        damaged = sum(turn.is_damaged for turn in talk.turns.values())
        if damaged:
            self._tell(
                f"[store] {damaged} of the chat's {len(talk.turns)} turns are damaged on the disk; they are marked and "
                "may not say what was said."
            )
        return talk

    def catch_up(self, talk: Conversation, running: Turn | None = None) -> list[Turn]:
        """Take in other windows' turns of a chat; returns the new ones. What is unsaved or ``running`` here stays."""
        self.flush()
        seen = (talk.chat.id, id(self.db), self.db.version)
        if seen == self._seen or not talk.turns:
            return []
        chat, keys = chats.load(self.db, talk.chat.id), self._waiting | self._standing_in
        stored = turns.load(self.db, talk.chat.id)
        new = talk.take_in(t for t in stored if f"1 {t.id}" not in keys and (running is None or t.id != running.id))
        if chat is not None:
            talk.chat.title, talk.chat.pinned = chat.title, chat.pinned
        if self.db.path is not None:  # turns that are not there any more
            ids = {t.id for t in stored}
            if lost := [t for t in talk.turns.values() if t.id not in ids and t is not running]:
                self._wait_for(talk, *lost)
        self._seen = seen
        return new

    def latest(self) -> Conversation | None:
        """The chat with turns that was changed last."""
        found = sorted((c for c in chats.listed(self.db) if c.turns), key=lambda c: c.changed)
        return self.open(found[-1].id) if found else None

    def recent_questions(self) -> list[str]:
        try:
            return turns.recent_questions(self.db)
        except StoreError:
            return []

    def keep(self, talk: Conversation, *changed: Turn) -> None:
        """Write a chat and its changed turns, now or as soon as it is possible; an empty chat is not kept."""
        if talk.turns:
            self._talk = talk
            self._wait_for(talk, *changed)
            self.flush()

    def keep_growing(self, talk: Conversation, turn: Turn) -> None:
        """As `keep`, for an answer being written: now if that is cheap, else with the next `flush`.

        A model may pause for long after any piece, so the front ends flush every `WRITE_EVERY_S`.
        """
        if self._clock() - self._wrote_at >= min(WRITE_EVERY_S, COST * self._took_s):
            self.keep(talk, turn)
        else:
            self._wait_for(talk, turn)

    def forget(self, turn: Turn) -> None:
        """Remove a turn."""
        self._waiting[f"1 {turn.id}"] = lambda: ("DELETE FROM turns WHERE id = ?", (turn.id,))

    def keep_draft(self, chat_id: str, content: str, chat: Chat | None = None) -> None:
        """Write the text that is typed but not sent; ``chat`` is one without turns, which is kept as long as it has a draft."""
        if chat is not None:
            self._waiting[f"0 {chat_id}"] = lambda: chats.saving_draft(chat, content)
            if content and chat.settings:
                self._waiting[f"5 {chat_id}"] = lambda: settings.changing(chat_id, chat.settings)
        self._waiting[f"2 {chat_id}"] = lambda: drafts.saving(chat_id, content)
        self.flush()

    def keep_attachments(self, chat_id: str, attachments: Iterable[Attachment]) -> None:
        """Write what is attached to a draft."""
        found = tuple(attachments)
        self._waiting[f"2 {chat_id} attachments"] = lambda: drafts.saving_attachments(chat_id, found)
        self.flush()

    def flush(self, is_last: bool = False) -> bool:
        """Write what waits; after a failure only every few seconds. Returns whether nothing waits any more."""
        if not self.unsaved:
            return True
        if self._trouble and not is_last and self._clock() - self._tried_at < RETRY_EVERY_S:
            self._write_in_memory()
            return False
        self._tried_at = self._clock()
        try:
            self._write(tries=4 if is_last else 1)
        except StoreError as e:
            self._must_open = e.kind not in (BUSY, FULL)
            if str(e) != self._trouble:
                self._trouble = str(e)
                self._tell(self._trouble)
            self._write_in_memory()
            return False
        self._trouble, self._wrote_at = "", self._clock()
        self._took_s = self._wrote_at - self._tried_at
        return True

    def report(self) -> list[str]:
        """Lines about turns that are not on disk; these are written elsewhere if possible."""
        lines = save_elsewhere(self.unsaved_turns())
        keys = self._waiting | self._standing_in
        if any(key.startswith("5 ") for key in keys):
            lines.append("[store] settings of a chat could not be saved.")
        if not lines or any(key.startswith("2 ") for key in keys):
            lines.append("[store] what was typed and not sent, or a title or pin, could not be saved.")
        return lines

    def close(self) -> bool:
        """Write what waits and close; returns whether everything is on disk."""
        is_done = self.flush(is_last=True)
        self.db.close()
        return is_done

    def _wait_for(self, talk: Conversation, *changed: Turn) -> None:
        chat_id = talk.chat.id
        self._talks[chat_id] = talk
        self._waiting[f"0 {chat_id}"] = lambda: chats.saving(talk.chat)
        for turn in changed:
            self._waiting[f"1 {turn.id}"] = lambda turn=turn: turns.saving(chat_id, turn)  # type: ignore[misc]

    def _write(self, tries: int) -> None:
        """Write to the file, which is opened again if needed; on a full disk snapshots are removed."""
        try:
            self._write_once(tries)
        except StoreError as e:
            if e.kind != FULL or not self._make_room(ROOM_BYTES):
                raise
            self._tell("[store] snapshots were removed to make room for the chat.")
            self._write_once(tries)

    def _write_once(self, tries: int) -> None:
        if self._must_open or not self.db.is_there:
            self._reopen()
        self.db.write(*self._changes(), tries=tries)
        self._waiting.clear()

    def _changes(self) -> list[Statement | Change]:
        """What waits: chats before their turns, turns in the order in which they were said."""
        return [self._waiting[key]() for key in sorted(self._waiting, key=lambda key: key[0])]

    def _reopen(self) -> None:
        """Open the file, or a new one, and write the whole chat and everything that was kept in memory."""
        if not self.db.is_there and self._talk is not None:
            newer, self._waiting = self._waiting, {}
            self._wait_for(self._talk, *self._talk.turns.values())
            self._waiting |= newer
            if chosen := self._talk.chat.settings:
                chat_id = self._talk.chat.id
                self._waiting[f"5 {chat_id}"] = lambda: settings.changing(chat_id, chosen)
        if self.db.path is not None:
            self.db.close()
            self._stand_in()
        opened = self._opened()
        self.db.close()
        self.db, self._must_open = opened, False
        self._waiting, self._standing_in = {**self._standing_in, **self._waiting}, {}

    def _opened(self) -> Database:
        db = Database(self._path)
        for note in db.notes:
            self._tell(note)
        return db

    def _stand_in(self) -> None:
        self.db, self._must_open = Database(None), True

    def _write_in_memory(self) -> None:
        """Write waiting changes to the store in memory, so that lists and searches find them."""
        if self.db.path is None:
            self.db.write(*self._changes())
            self._standing_in.update(self._waiting)
            self._waiting.clear()
