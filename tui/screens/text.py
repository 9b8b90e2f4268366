"""An editor for a short or long text."""

from __future__ import annotations

from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static, TextArea

from ring_mlx import harmless


class TextScreen(ModalScreen[str | None]):
    """Many lines; Ctrl+S ends with the text, Escape with nothing.

    Args:
        title: What it is and what saving does.
        text: At the start.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Done"),
        Binding("escape", "dismiss(None)", "Leave"),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """The title above the text."""
        with Vertical(classes="dialog"):
            yield Static(self._title, classes="title", markup=False)
            yield TextArea(harmless(self._text), show_line_numbers=False, soft_wrap=True)
            yield Footer()

    def on_mount(self) -> None:
        """Begin at the end."""
        area = self.query_one(TextArea)
        area.move_cursor(area.document.end)
        area.focus()

    def on_paste(self, event: events.Paste) -> None:
        """Clean what is pasted."""
        event.text = harmless(event.text.replace("\r\n", "\n").replace("\r", "\n"))

    def action_save(self) -> None:
        """End with the text."""
        self.dismiss(self.query_one(TextArea).text)


class LineScreen(ModalScreen[str | None]):
    """One line; Enter ends with it, Escape with nothing.

    Args:
        title: What it is.
        text: At the start.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave", priority=True)]

    def __init__(self, title: str, text: str = "") -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """The title above the line."""
        with Vertical(classes="dialog small"):
            yield Static(self._title, classes="title", markup=False)
            yield Input(harmless(self._text))

    @on(Input.Submitted)
    def submitted(self, message: Input.Submitted) -> None:
        """End with the text."""
        message.stop()
        self.dismiss(message.value.strip() or None)
