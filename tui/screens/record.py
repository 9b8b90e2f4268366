"""Shows how one answer came to be, line by line."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.records import record_lines
from tui.store import Record


class RecordScreen(ModalScreen[None]):
    """An answer's record."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,i,q", "dismiss", "Close")]

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def compose(self) -> ComposeResult:
        """All of it as one text."""
        with VerticalScroll(classes="dialog"):
            yield Static("How this answer came to be", classes="title")
            yield Static("\n".join(record_lines(self._record)), markup=False)
