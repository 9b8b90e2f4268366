"""Commands and keys, from the one table of them."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from tui import paths
from tui.commands import help_rows


class HelpScreen(ModalScreen[None]):
    """The table.

    Args:
        keys: Remapped keys by command.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,f1,q", "dismiss", "Close")]

    def __init__(self, keys: dict[str, str]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        """A line for each command, and what has no command."""
        more = (
            "Enter sends, ^J begins a line; Up and Down at the prompt's edges recall what was sent.\n"
            "@path attaches a file; a dropped file or a long paste becomes an attachment.\n"
            "Keys in brackets are for the turn that has the focus: Shift+Tab goes to the turns, Tab or Esc comes back.\n"
            f"^P opens the palette. Keys and settings are in {paths.config_file()}."
        )
        with VerticalScroll(classes="dialog"):
            yield Static("Commands and keys", classes="title")
            for name, key, text in help_rows(self._keys):
                with Horizontal(classes="row"):
                    yield Static(key, classes="key", markup=False)
                    yield Static(Content.assemble((name, "bold"), f" · {text}"), classes="what")
            yield Static(more, classes="more", markup=False)
