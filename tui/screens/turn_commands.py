"""Commands about turns: another answer, edits, branches, copies, and going from one to another."""

from __future__ import annotations

from dataclasses import replace

from textual import on

from tui.gauges import counted
from tui.interrupts import Interrupts
from tui.keys import COMMANDS
from tui.screens.answers import AnswerView
from tui.screens.text import RecordScreen, TextScreen
from tui.store import Record, Turn
from tui.store.exchange import written
from tui.store.records import ASSISTANT, USER
from tui.widgets.answer import CopyCode


class TurnCommands(AnswerView):
    """Each is about the turn in focus, or else about the last one."""

    def do_stop(self, _: str) -> None:
        self.engine.stop()

    def do_edit(self, _: str) -> None:
        turn = None if self.is_busy else self.focused_turn or self.chosen(USER)
        if turn is not None:
            title = "Edit the question: Ctrl+S asks it beside the old one" if turn.role == USER else "Edit the answer"

            def edited(text: str | None) -> None:
                if text is not None and text.strip():
                    self.run_worker(self._edited(turn, text), group=COMMANDS)

            self.write_in(TextScreen(title, turn.content), edited)

    async def _edited(self, turn: Turn, text: str) -> None:
        if self.is_busy:  # a question that waited has been asked meanwhile
            self.entry.give_back(text)
            return
        self.talk.mark()
        new = self.talk.beside(turn, text)
        if turn.role == ASSISTANT:
            new.thinking, new.calls = turn.thinking, turn.calls
            new.record = replace(turn.record or Record(), is_edited=True)
        self.keeper.keep(self.talk, new)
        if turn.role == USER:
            await self.attempt(self.ask)
        else:
            await self.refresh_turns()
            self.entry.prompt.focus()

    async def do_branch(self, _: str) -> None:
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
        await self._switch(1)

    async def do_previous(self, _: str) -> None:
        await self._switch(-1)

    async def _switch(self, step: int) -> None:
        if self.is_busy:
            return
        focused = turn = self.focused_turn
        if turn is None:
            branched = (t for t in reversed(self.talk.path()) if len(self.talk.siblings(t)) > 1)
            turn = next(branched, self.chosen())
        new = self.talk.switch(turn, step) if turn is not None else None
        if new is None:
            self.say("There is no other branch in that direction.")
            return
        self.keeper.keep(self.talk)
        await self.refresh_turns(focus=new.id if focused else None)

    async def do_undo(self, _: str) -> None:
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
        turn = self.focused_turn or self.chosen_answer()
        if turn is not None:
            self._copy(written(turn), "the answer" if turn.role == ASSISTANT else "the question")

    def do_code(self, argument: str) -> None:
        turn = self.chosen_answer()
        view = self.answer_view(turn) if turn is not None else None
        codes = view.codes() if view is not None else []
        index = int(argument[:9]) if argument.isdecimal() else len(codes)
        if 1 <= index <= len(codes):
            self._copy(codes[index - 1], "the code")
        else:
            self.say(f"The answer has {counted(len(codes), 'code block')}.")

    @on(CopyCode)
    def copy_code(self, message: CopyCode) -> None:
        self._copy(message.code, "the code")

    def _copy(self, text: str, what: str) -> None:
        assert isinstance(self.app, Interrupts)
        self.app.copy(text, what)

    def do_thought(self, _: str) -> None:
        turn = self.chosen_answer()
        if turn is not None and (view := self.answer_view(turn)) is not None:
            view.toggle()

    def do_record(self, _: str) -> None:
        turn = self.chosen_answer()
        if turn is not None and turn.record is not None:
            self.app.push_screen(RecordScreen(turn.record))
        elif turn is not None:
            self.say("The answer is not finished; its record is written at its end.")

    async def do_up(self, _: str) -> None:
        await self._move(-1)

    async def do_down(self, _: str) -> None:
        await self._move(1)

    async def _move(self, step: int) -> None:
        """Go to the turn above or below; the prompt is below the last one."""
        path, turn = self.talk.path(), self.focused_turn
        at = (path.index(turn) if turn is not None and turn in path else len(path)) + step
        if 0 <= at < len(path):
            await self.turns.go(path[at].id)
        elif at >= len(path):
            self.turns.anchor()
            self.entry.prompt.focus()

    async def do_first(self, _: str) -> None:
        await self.do_go("1")

    async def do_last(self, _: str) -> None:
        await self.do_go(str(len(self.talk.path())))

    async def do_go(self, argument: str) -> None:
        path = self.talk.path()
        if argument.isdecimal() and 1 <= int(argument[:9]) <= len(path):
            await self.turns.go(path[int(argument[:9]) - 1].id)
        else:
            self.say(f"There are turns 1 to {len(path)}." if path else "There are no turns yet.")
