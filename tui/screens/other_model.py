"""Which model is to answer in a chat whose own is not the one that is loaded."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import OptionList, Static

from ring_mlx import harmless
from tui.screens.dialog import Dialog
from tui.widgets.choices import Choices, row

LOAD, GO_ON = "load", "go on"


class OtherModelScreen(Dialog[str | None]):
    """Ends with `LOAD`, `GO_ON`, or with nothing; ``own`` is the chat's model, ``loaded`` the other one."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back", priority=True)]

    def __init__(self, own: str, loaded: str) -> None:
        super().__init__()
        self._own, self._loaded = own, loaded
        self._ways: Choices[str] = Choices(id="ways")

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog small"):
            yield Static(
                f"This chat's model is not loaded: {harmless(self._own, is_name=True)}", classes="title", markup=False
            )
            yield self._ways
            yield Static("Enter chooses, Esc goes back.", classes="more", markup=False)

    def on_mount(self) -> None:
        self._ways.fill(
            [
                (LOAD, row(f"Load {self._own}", "then ask")),
                (GO_ON, row(f"Go on with {self._loaded}", "from now on")),
            ]
        )
        self._ways.focus()

    @on(OptionList.OptionSelected)
    def choose(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.dismiss(self._ways.chosen)
