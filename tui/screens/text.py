"""Screens that show or edit a text."""

from __future__ import annotations

from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static, TextArea

from ring_mlx import harmless
from tui import paths
from tui.commands import help_rows
from tui.records import record_lines
from tui.screens.dialog import Dialog, Keys, Writing
from tui.store import Record

PREVIEWED = 100_000
MORE_HELP = """\
Enter sends, ^J begins a line; Up and Down at the prompt's edges recall what was sent.
@path attaches a file; a dropped file or a long paste becomes an attachment.
Keys in brackets are for the turn that has the focus: Shift+Tab goes to the turns, Tab or Esc comes back.
^P opens the palette. Keys and settings are in {}."""


class HelpScreen(Dialog[None]):
    """Commands and keys; ``keys`` are remapped ones by command."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,f1,q", "dismiss", "Close")]

    def __init__(self, keys: dict[str, str]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static("Commands and keys", classes="title")
            for name, key, text in help_rows(self._keys):
                with Horizontal(classes="row"):
                    yield Static(key, classes="key", markup=False)
                    yield Static(Content.assemble((name, "bold"), f" · {text}"), classes="what")
            yield Static(MORE_HELP.format(paths.config_file()), classes="more", markup=False)


class RecordScreen(Dialog[None]):
    """How an answer came to be, line by line."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,i,q", "dismiss", "Close")]

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static("How this answer came to be", classes="title")
            yield Static("\n".join(record_lines(self._record)), markup=False)


class TextScreen(Writing[str | None]):
    """Many lines below a title; Ctrl+S ends with the text if it is another one now, Escape with nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Done"),
        Binding("escape", "dismiss(None)", "Leave"),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self._area = TextArea(harmless(text), show_line_numbers=False, soft_wrap=True)
        self._before = self._area.text

    @property
    def unsaved(self) -> str:
        return self._area.text if self._area.text != self._before else ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self._title, classes="title", markup=False)
            yield self._area
            yield Keys()

    def on_mount(self) -> None:
        self._area.move_cursor(self._area.document.end)
        self._area.focus()

    def on_paste(self, event: events.Paste) -> None:
        """Clean what is pasted."""
        event.text = harmless(event.text.replace("\r\n", "\n").replace("\r", "\n"))

    def action_save(self) -> None:
        self.dismiss(self.unsaved)


class PreviewScreen(Dialog[bool]):
    """The beginning of an attached text; ends with whether it is taken away."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(False)", "Back", priority=True),
        Binding("ctrl+x", "dismiss(True)", "Take away", priority=True),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        more = f", of which the first {PREVIEWED:,} characters are shown" if len(self._text) > PREVIEWED else ""
        with Vertical(classes="dialog"):
            yield Static(f"{self._title}{more}", classes="title", markup=False)
            yield TextArea(harmless(self._text[:PREVIEWED]), read_only=True, soft_wrap=False, show_line_numbers=True)
            yield Keys()


class LineScreen(Dialog[str | None]):
    """One line below a title; Enter ends with it, Escape with nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave", priority=True)]

    def __init__(self, title: str, text: str = "") -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog small"):
            yield Static(self._title, classes="title", markup=False)
            yield Input(harmless(self._text))

    @on(Input.Submitted)
    def submitted(self, message: Input.Submitted) -> None:
        message.stop()
        self.dismiss(message.value.strip() or None)
