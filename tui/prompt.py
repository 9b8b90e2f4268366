"""Where the user writes: Enter sends, Ctrl+J starts a new line; knows no conversation.

Both keys are handled among the letters, not as priority bindings, which would overtake letters that came in one burst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.harmless import harmless

NEW_LINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class Prompt(TextArea):
    """A text area that grows with its text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send"),
        Binding("ctrl+j", "insert_line", "New line"),
        Binding("pageup", "app.page(-1)", show=False),
        Binding("pagedown", "app.page(1)", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user pressed Enter on a text that is not blank, and the prompt is empty again."""

        text: str

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(
            id=id, placeholder="Ask something", show_line_numbers=False, highlight_cursor_line=False, soft_wrap=True
        )

    def give_back(self, text: str) -> None:
        """Put a text that was sent in vain back, before what the user has begun since."""
        self.text = f"{text}\n{self.text}" if self.text.strip() else text
        self.move_cursor(self.document.end)

    def on_key(self, event: events.Key) -> None:
        """Take the keys that a text area would treat otherwise."""
        if event.key == "enter" or event.key in NEW_LINE_KEYS:
            event.stop()
            event.prevent_default()
            if event.key == "enter":
                self.action_send()
            else:
                self.action_insert_line()

    def on_paste(self, event: events.Paste) -> None:
        """Clean what the text area is about to insert; many terminals paste line ends as carriage returns."""
        event.text = harmless(event.text.replace("\r\n", "\n").replace("\r", "\n"))

    def action_send(self) -> None:
        """Hand the text over."""
        if text := self.text.strip():
            self.clear()
            self.post_message(self.Sent(text))

    def action_insert_line(self) -> None:
        """Start a new line."""
        self.insert("\n")
