"""The prompt with its attachments and completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList

from ring_mlx import RingError
from tui import commands, files
from tui.store import Attachment
from tui.widgets.attachments import Attachments
from tui.widgets.completion import Completion
from tui.widgets.prompt import Prompt

_MENTION_AT_END = re.compile(r"(?<!\S)@(\S*)$")


class Entry(Vertical):
    """What is being written."""

    @dataclass
    class Asked(Message):
        """A question that is not blank."""

        text: str
        attachments: list[Attachment]

    @dataclass
    class Commanded(Message):
        """A slash command."""

        text: str

    @dataclass
    class Trouble(Message):
        """Something to tell the user in one line."""

        text: str

    class Changed(Message):
        """The text is another one."""

    def __init__(self, keys: dict[str, str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.completion, self.attachments = Completion(), Attachments()
        self.prompt = Prompt(self.completion, keys, id="prompt")
        self._pastes = 0

    def compose(self) -> ComposeResult:
        """Completions and attachments above the text."""
        yield self.completion
        yield self.attachments
        yield self.prompt

    def give_back(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Have a question again that was not answered."""
        self.prompt.give_back(text)
        for attachment in attachments:
            self.attachments.add(attachment)

    def attach(self, path: str) -> None:
        """Attach a file, or say why not."""
        try:
            self.attachments.add(files.read_attachment(path))
        except RingError as e:
            self.post_message(self.Trouble(str(e)))

    @on(Prompt.Sent)
    def sent(self, message: Prompt.Sent) -> None:
        """Tell a command from a question; files that the question mentions come with it."""
        message.stop()
        if commands.is_command(message.text):
            self.post_message(self.Commanded(message.text))
            return
        for path in files.mentioned(message.text):
            self.attach(path)
        if message.text or self.attachments.found:
            self.post_message(self.Asked(message.text, self.attachments.take()))

    @on(Prompt.Pasted)
    def pasted(self, message: Prompt.Pasted) -> None:
        """Attach a dropped file or a long text; anything else is inserted."""
        message.stop()
        if paths := files.dropped(message.text):
            for path in paths:
                self.attach(path)
        elif "\n" not in message.text.strip() and len(message.text) < 3000:
            self.prompt.insert(message.text)
        else:
            self._pastes += 1
            self.attachments.add(Attachment(f"pasted {self._pastes}", message.text))

    @on(Prompt.EmptyBackspace)
    def take_back(self, message: Prompt.EmptyBackspace) -> None:
        """Take the last attachment away."""
        message.stop()
        self.attachments.set(self.attachments.found[:-1])

    @on(Prompt.Changed)
    def complete(self, message: Prompt.Changed) -> None:
        """Offer commands after a slash and files after an @."""
        message.stop()
        self.post_message(self.Changed())
        text = self.prompt.text
        if commands.is_command(text) and " " not in text:
            self.completion.offer([(f"/{c.name}", c.help) for c in commands.completions(text)], text)
        elif (found := _MENTION_AT_END.search(self._before_cursor)) is not None:
            self.completion.offer([(path, "") for path in files.completions(found[1])], text)
        else:
            self.completion.offer([])

    @on(Prompt.Completed)
    def completed(self, message: Prompt.Completed) -> None:
        """Put the chosen text in place of what led to it; a command that needs nothing more is sent."""
        message.stop()
        if message.text.startswith("/") and commands.is_command(self.prompt.text):
            argument = commands.NAMED[message.text[1:]].argument
            self.prompt.replace_text(f"{message.text} " if argument else message.text)
            if message.sends and (not argument or argument.startswith("[")):
                self.prompt.send()
            return
        end = self.prompt.cursor_location
        found = _MENTION_AT_END.search(self._before_cursor)
        if found is not None:
            start = (end[0], end[1] - len(found[1]))
            self.prompt.replace(message.text + ("" if message.text.endswith("/") else " "), start, end)

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        """A click chooses as Tab does."""
        message.stop()
        if (chosen := self.completion.chosen) is not None:
            self.prompt.focus()
            self.prompt.post_message(Prompt.Completed(chosen, sends=False))

    @property
    def _before_cursor(self) -> str:
        row, column = self.prompt.cursor_location
        return str(self.prompt.document.get_line(row))[:column]
