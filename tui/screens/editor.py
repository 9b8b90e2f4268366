"""The prompt in the user's editor."""

from __future__ import annotations

from textual.app import SuspendNotSupported

from tui.editor import EditorError, edited
from tui.interrupts import Interrupts
from tui.keys import COMMANDS
from tui.screens.compact import CompactCommand

LONGEST_PROMPT = 100_000  # characters; a longer text from the editor is attached, since each key would take long


class EditorCommands(CompactCommand):
    """What the user writes there comes back into the prompt, or is attached if it is very long."""

    def do_editor(self, _: str) -> None:
        self.keep_draft()
        self.run_worker(self.attempt(self._edit_prompt), group=COMMANDS)

    async def _edit_prompt(self) -> None:
        prompt, chat_id = self.entry.prompt, self.talk.chat.id
        before = prompt.text
        text = await edited(before, self.lend)
        if self.talk.chat.id != chat_id or prompt.text != before:  # nothing typed meanwhile is lost
            self.entry.give_back(text)
        elif len(text) > LONGEST_PROMPT:
            prompt.begin("")
            self.entry.pasted(text)
        else:
            prompt.begin(text)
        prompt.focus()

    async def lend(self, command: list[str]) -> int:
        assert isinstance(self.app, Interrupts)
        try:
            return await self.app.lend(command)
        except SuspendNotSupported:
            raise EditorError("there is no terminal for an editor; write in the prompt.") from None
