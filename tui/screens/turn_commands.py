"""Commands about turns: another answer, edits, branches, copies, and going from one to another."""

from __future__ import annotations

from dataclasses import replace

from textual import on

from tui.messages import Sampling
from tui.records import sampling_of
from tui.screens.asking import Asking
from tui.screens.record import RecordScreen
from tui.screens.text import TextScreen
from tui.store import Record, Turn
from tui.store.exchange import written
from tui.store.records import ASSISTANT, USER
from tui.widgets.answer import CopyCode
from tui.widgets.turn import TurnView


class TurnCommands(Asking):
    """Each about the turn in focus, or else about the last one."""

    def do_stop(self, _: str) -> None:
        """End the running answer; what was written stays."""
        self.engine.stop()

    async def do_regenerate(self, _: str) -> None:
        """Answer again beside the present answer."""
        if not self.is_busy:
            await self._again(self.chosen())

    async def do_repeat(self, _: str) -> None:
        """Answer again as the record says: with the same seed and sampling."""
        turn = None if self.is_busy else self.chosen_answer()
        if turn is None:
            return
        sampling = sampling_of(turn.record)
        if sampling is None:
            self.say("The answer's record names no seed; /regenerate answers with another one.")
            return
        if turn.record is not None and turn.record.model != self.model.name:
            self.say(f"That answer was {turn.record.model}'s; {self.model.name} will say something else.", "warning")
        await self._again(turn, sampling)

    async def _again(self, turn: Turn | None, sampling: Sampling | None = None) -> None:
        if turn is not None and turn.role == ASSISTANT:
            turn = self.talk.turns.get(turn.parent or "")
        if turn is None:
            self.say("There is no question yet.")
            return
        self.talk.cut_after(turn)
        await self.turns.show(self.talk.path())
        self.entry.prompt.focus()
        await self.ask(sampling)

    def do_edit(self, _: str) -> None:
        """Open a turn for writing."""
        turn = None if self.is_busy else self.chosen() if self._has_focus else self.chosen(USER)
        if turn is not None:
            title = "Edit the question: Ctrl+S asks it beside the old one" if turn.role == USER else "Edit the answer"

            def edited(text: str | None) -> None:
                if text is not None and text.strip() and text != turn.content:
                    self.run_worker(self._edited(turn, text))

            self.app.push_screen(TextScreen(title, turn.content), edited)

    async def _edited(self, turn: Turn, text: str) -> None:
        if self.is_busy:
            return
        self.talk.mark()
        new = self.talk.beside(turn, text)
        if turn.role == ASSISTANT:
            new.thinking, new.calls = turn.thinking, turn.calls
            new.record = replace(turn.record or Record(), is_edited=True)
        self.keeper.keep(self.talk, new)
        await self.refresh_turns()
        self.entry.prompt.focus()
        if turn.role == USER:
            await self.ask()

    async def do_continue(self, _: str) -> None:
        """Go on with an answer."""
        turn = None if self.is_busy else self.chosen_answer()
        if turn is None:
            return
        if not turn.content.strip():
            self.say("The answer has no text to go on from; /regenerate asks again.")
            return
        if turn.calls:
            self.say("The answer ended with a tool call; there is nothing to go on from.")
            return
        if turn is not self.talk.leaf:
            self.talk.cut_after(turn)
        self.talk.mark(turn)
        self.entry.prompt.focus()
        await self.go_on(turn)

    async def do_branch(self, _: str) -> None:
        """End the view after a turn; a question goes into the prompt to be asked otherwise."""
        turn = None if self.is_busy else self.chosen()
        if turn is None:
            return
        if turn.role == USER:
            self.talk.cut_after(self.talk.turns.get(turn.parent or ""))
            self.entry.give_back(turn.content, turn.attachments)
        else:
            self.talk.cut_after(turn)
        self.keeper.keep(self.talk)
        await self.refresh_turns()
        self.entry.prompt.focus()
        self.say("What you say next begins a branch; /undo goes back.")

    async def do_next(self, _: str) -> None:
        """Show the next branch."""
        await self._switch(1)

    async def do_previous(self, _: str) -> None:
        """Show the previous branch."""
        await self._switch(-1)

    async def _switch(self, step: int) -> None:
        if self.is_busy:
            return
        turn = self.chosen()
        if not self._has_focus:
            turn = next((t for t in reversed(self.talk.path()) if len(self.talk.siblings(t)) > 1), turn)
        new = self.talk.switch(turn, step) if turn is not None else None
        if new is None:
            self.say("There is no other branch in that direction.")
            return
        self.keeper.keep(self.talk)
        await self.refresh_turns(focus=new.id if self._has_focus else None)

    async def do_undo(self, _: str) -> None:
        """Go back before the last change; a question taken back returns to the prompt."""
        if self.is_busy:
            return
        before = self.talk.path()
        if not self.talk.undo():
            self.say("There is nothing to undo.")
            return
        after = self.talk.path()
        gone = before[len(after) :] if before[: len(after)] == after else []
        if gone and gone[0].role == USER and not self.entry.prompt.text:
            self.entry.give_back(gone[0].content, gone[0].attachments)
        self.keeper.keep(self.talk, *after[-1:])
        await self.refresh_turns()
        self.entry.prompt.focus()

    def do_copy(self, _: str) -> None:
        """Copy a turn's text; a thought is never part of it."""
        turn = self.chosen() if self._has_focus else self.chosen_answer()
        if turn is not None:
            self._copy(written(turn), "the answer" if turn.role == ASSISTANT else "the question")

    def do_code(self, argument: str) -> None:
        """Copy a code block of an answer."""
        turn = self.chosen_answer()
        view = self.answer_view(turn) if turn is not None else None
        codes = view.codes() if view is not None else []
        index = int(argument) if argument.isdigit() else len(codes)
        if not 1 <= index <= len(codes):
            self.say(f"The answer has {len(codes)} code blocks.")
            return
        self._copy(codes[index - 1], "the code")

    @on(CopyCode)
    def copy_code(self, message: CopyCode) -> None:
        """Copy the block that was clicked."""
        self._copy(message.code, "the code")

    def do_thought(self, _: str) -> None:
        """Open or fold a thought."""
        turn = self.chosen_answer()
        if turn is not None and (view := self.answer_view(turn)) is not None:
            view.toggle()

    def do_record(self, _: str) -> None:
        """Show how an answer came to be."""
        turn = self.chosen_answer()
        if turn is not None and turn.record is not None:
            self.app.push_screen(RecordScreen(turn.record))
        elif turn is not None:
            self.say("The answer is not finished; its record is written at its end.")

    async def do_up(self, _: str) -> None:
        """Go to the turn above, from the prompt to the last one."""
        await self._move(-1)

    async def do_down(self, _: str) -> None:
        """Go to the turn below, from the last one to the prompt."""
        await self._move(1)

    async def do_first(self, _: str) -> None:
        """Go to the first turn."""
        await self.do_go("1")

    async def do_last(self, _: str) -> None:
        """Go to the last turn."""
        await self.do_go(str(len(self.talk.path())))

    async def do_go(self, argument: str) -> None:
        """Go to a turn by its number."""
        path = self.talk.path()
        if argument.isdigit() and 1 <= int(argument) <= len(path):
            await self.turns.go(path[int(argument) - 1].id)
        else:
            self.say(f"There are turns 1 to {len(path)}." if path else "There are no turns yet.")

    async def _move(self, step: int) -> None:
        path = self.talk.path()
        turn = self.chosen() if self._has_focus else None
        at = path.index(turn) + step if turn in path and turn is not None else len(path) - 1 if step < 0 else len(path)
        if 0 <= at < len(path):
            await self.turns.go(path[at].id)
        elif at >= len(path):
            self.turns.anchor()
            self.entry.prompt.focus()

    @property
    def _has_focus(self) -> bool:
        return isinstance(self.focused, TurnView)

    def _copy(self, text: str, what: str) -> None:
        self.app.copy_to_clipboard(text)
        self.say(f"Copied {what}.")
