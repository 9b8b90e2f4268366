"""A summary of a long chat, with which a new one goes on."""

from __future__ import annotations

import asyncio

from tui.conversation import Conversation
from tui.screens.find import FindCommands
from tui.store import Attachment, Turn
from tui.store.records import USER

WISH = (
    "Sum up our conversation so far for a reader who has only your summary and goes on with it: the aim, what was found "
    "and decided, the names, numbers and code that are still needed, and what is open."
)


class CompactCommand(FindCommands):
    """The summary is a branch of the chat, and is attached to the first question of a new one."""

    _wish: Turn | None = None  # is being answered

    async def do_compact(self, _: str) -> None:
        if self.is_busy:
            return
        if len(self.talk.path()) < 2:
            self.say("There is nothing to sum up yet.")
            return
        messages = self.messages_with(WISH, [])
        if reason := await asyncio.to_thread(self.refusal, messages):
            self.say(reason, "error")
            return
        self.talk.mark()
        self._wish = self.talk.add(USER, WISH)
        self.keeper.keep(self.talk, self._wish)
        await self.attempt(self.ask)

    async def answered(self, answer: Turn, reason: str) -> None:
        wish, self._wish = self._wish, None
        if wish is None or answer.parent != wish.id or reason != "stop" or not answer.content.strip():
            return
        self.entry.unqueue()
        self.talk.chat.leaf = wish.parent
        self.keeper.keep(self.talk)
        summary = Attachment(f"summary of {self.talk.chat.title}", answer.content)
        await self.open_chat(Conversation())
        self.entry.attachments.add(summary)
        self.say(
            "Your next question begins a chat with the summary. The old chat is as it was; /tree shows it there too."
        )
