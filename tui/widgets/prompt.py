"""Where the user writes: Enter sends, Ctrl+J starts a new line.

Keys are handled among the letters, not as priority bindings, which would overtake letters that came in one burst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from ring_mlx import harmless
from tui.widgets.completion import Completion

LONG_CHARACTERS, LONG_LINES = 3000, 30


class Prompt(TextArea):
    """A text area that grows with its text.

    Args:
        completion: The list that its keys move while it is shown.
        keys: Keys of "send" and "new_line", with commas between them.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "screen.page(-1)", show=False),
        Binding("pagedown", "screen.page(1)", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user pressed Enter."""

        text: str

    @dataclass
    class Pasted(Message):
        """A text came in one piece: long, or perhaps the path of a dropped file."""

        text: str

    @dataclass
    class Completed(Message):
        """The user chose one of the completions; ``sends`` where Enter chose it."""

        text: str
        sends: bool

    class EmptyBackspace(Message):
        """The user pressed Backspace where there is nothing left to take away."""

    def __init__(self, completion: Completion, keys: dict[str, str], *, id: str | None = None) -> None:
        super().__init__(
            id=id, placeholder="Ask something", show_line_numbers=False, highlight_cursor_line=False, soft_wrap=True
        )
        self._completion = completion
        self._keys = {key: name for name, found in keys.items() for key in found.split(",")}
        self.past: list[str] = []
        self._at, self._written = 0, ""

    def remember(self, texts: Sequence[str]) -> None:
        """Take over what was sent before, the oldest first."""
        self.past = list(texts)
        self._at = len(self.past)

    def give_back(self, text: str) -> None:
        """Put a text that was sent in vain back, before what the user has begun since."""
        self.replace_text(f"{text}\n{self.text}" if self.text.strip() else text)

    def replace_text(self, text: str) -> None:
        """Have this text, with the cursor at its end."""
        self.text = text
        self.move_cursor(self.document.end)

    def on_key(self, event: events.Key) -> None:
        """Take the keys that a text area would treat otherwise."""
        if self._completing(event.key) or self._own(event.key):
            event.stop()
            event.prevent_default()

    def on_paste(self, event: events.Paste) -> None:
        """Clean what the text area is about to insert; many terminals paste line ends as carriage returns."""
        text = harmless(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        event.text = text
        is_long = len(text) > LONG_CHARACTERS or text.count("\n") > LONG_LINES
        if is_long or (len(text) > 1 and "\n" not in text.strip() and ("/" in text or text.startswith("~"))):
            event.stop()
            event.prevent_default()
            self.post_message(self.Pasted(text))

    def send(self) -> None:
        """Hand the text over; the prompt is then empty."""
        text = self.text.strip()
        self.clear()
        if text and text not in self.past[-1:]:
            self.past.append(text)
        self._at, self._written = len(self.past), ""
        self.post_message(self.Sent(text))

    def recall(self, step: Literal[-1, 1]) -> None:
        """Show the text sent before or after; what is being written comes last."""
        at = self._at + step
        if not 0 <= at <= len(self.past):
            return
        if self._at == len(self.past):
            self._written = self.text
        self._at = at
        self.replace_text(self._written if at == len(self.past) else self.past[at])

    def _own(self, key: str) -> bool:
        row, last = self.cursor_location[0], self.document.line_count - 1
        name = self._keys.get(key)
        if name == "send":
            self.send()
        elif name == "new_line":
            self.insert("\n")
        elif key == "up" and row == 0 and self._at > 0:
            self.recall(-1)
        elif key == "down" and row == last and self._at < len(self.past):
            self.recall(1)
        elif key == "backspace" and not self.text:
            self.post_message(self.EmptyBackspace())
        else:
            return False
        return True

    def _completing(self, key: str) -> bool:
        if not self._completion.display or self._completion.typed != self.text:  # keys came faster than the list
            return False
        if key in ("up", "down"):
            self._completion.move(-1 if key == "up" else 1)
        elif key in ("tab", "enter") and (chosen := self._completion.chosen) is not None:
            self.post_message(self.Completed(chosen, sends=key == "enter"))
        elif key == "escape":
            self._completion.offer([])
        else:
            return False
        return True
