"""Search within the chat in view: hits are marked, the next or previous one is brought into view."""

from __future__ import annotations

import asyncio

from textual import on

from tui.conversation import Conversation
from tui.screens.turn_commands import TurnCommands
from tui.widgets.find import FindBar, Marks, count, pattern

TRIES, TRY_EVERY_S = 25, 0.04  # Markdown mounts its text a while after its turn has been mounted


class FindCommands(TurnCommands):
    """The bar and its hits: a turn and the how manieth of it, in the order of the branch."""

    _marks: Marks | None = None
    _at = 0

    async def do_find(self, words: str) -> None:
        bar = self.find_bar
        bar.display = True
        if words:
            with bar.prevent(bar.words.Changed):
                bar.words.value = words
        bar.words.focus()
        if bar.words.value:
            await self._find()

    @on(FindBar.Changed)
    async def words_changed(self) -> None:
        if self.find_bar.display:
            await self._find()

    @on(FindBar.Stepped)
    async def stepped(self, message: FindBar.Stepped) -> None:
        if message.step:
            self._at += message.step
            await self._show_hit()
        else:
            self.end_find()
            self.entry.prompt.focus()

    async def show_chat(self, talk: Conversation, at: str | None = None) -> None:
        self.end_find()
        await super().show_chat(talk, at)

    def end_find(self) -> None:
        """Close the bar and take the marks away."""
        self.find_bar.display = False
        if self._marks is not None:
            self._marks.clear()

    async def _find(self) -> None:
        """Begin at the last hit, which is nearest to the prompt."""
        self._at = -1
        await self._show_hit()

    async def _show_hit(self) -> None:
        words = self.find_bar.words.value
        marks = self._marks = self._marks or Marks()
        if not words.strip():
            marks.clear()
            self.find_bar.say("")
            return
        wanted = pattern(words)
        hits = [(turn.id, n) for turn in self.talk.path() for n in range(count(turn, wanted))]
        if not hits:
            marks.clear()
            self.find_bar.say("nothing found")
            return
        self._at %= len(hits)
        self.find_bar.say(f"{self._at + 1} of {len(hits)}")
        turn_id, nth = hits[self._at]
        view = await self.turns.bring(turn_id)
        for _ in range(TRIES):
            if view is None:
                break
            marks.show(self.turns.views, wanted)
            if spots := marks.spots(view):
                static, span = spots[min(nth, len(spots) - 1)]
                marks.emphasize((static, span))
                self.turns.reveal(view, static, span[0])
                return
            await asyncio.sleep(TRY_EVERY_S)
