"""A choice among the models on this machine, or any folder or hub name."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from tui.messages import ModelChoice
from tui.models import Found, found_models
from tui.widgets.choices import Choices, row


class ModelsScreen(ModalScreen[ModelChoice | None]):
    """Ends with a choice, or with nothing.

    Args:
        current: The name of the model in use.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back", priority=True),
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
    ]

    def __init__(self, current: str) -> None:
        super().__init__()
        self._current = current
        self._models: Choices[Found] = Choices(id="models")

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Choose a model", classes="title")
            yield self._models
            yield Input(placeholder="or a folder, or OWNER/NAME on the hub")

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self._look()

    @work(thread=True)
    def _look(self) -> None:
        found = found_models()
        rows = [(f, row(f.name, f.remark, "● " if f.name == self._current else "  ")) for f in found]
        self.app.call_from_thread(self._models.fill, rows)

    def action_move(self, step: int) -> None:
        self._models.move(step)

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def choose(self, message: Input.Submitted | OptionList.OptionSelected) -> None:
        """End with the name typed, or with the highlighted or clicked model."""
        message.stop()
        name = message.value.strip() if isinstance(message, Input.Submitted) else ""
        if name:
            self.dismiss(ModelChoice(name))
        elif (found := self._models.chosen) is not None:
            self.dismiss(ModelChoice(found.path))
