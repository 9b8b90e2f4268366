"""A choice among the models on this machine, or any folder or hub name."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from ring_mlx import harmless
from tui.messages import ModelChoice
from tui.models import Found, found_models


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
        self._found: list[Found] = []

    def compose(self) -> ComposeResult:
        """The models above a line for any other."""
        with Vertical(classes="dialog"):
            yield Static("Choose a model", classes="title")
            yield OptionList(id="models")
            yield Input(placeholder="or a folder, or OWNER/NAME on the hub")

    def on_mount(self) -> None:
        """Look for models without stopping the screen."""
        self.query_one(Input).focus()
        self._look()

    @work(thread=True)
    def _look(self) -> None:
        found = found_models()
        self.app.call_from_thread(self._show, found)

    def _show(self, found: list[Found]) -> None:
        self._found = found
        models = self.query_one(OptionList)
        models.add_options(
            [
                Option(
                    Content.assemble(
                        "● " if f.name == self._current else "  ",
                        harmless(f.name, is_name=True),
                        (f"  {harmless(f.remark, is_name=True)}", "$text-muted"),
                    )
                )
                for f in found
            ]
        )
        models.highlighted = 0

    def action_move(self, step: int) -> None:
        """Highlight another model."""
        models = self.query_one(OptionList)
        if self._found:
            models.highlighted = ((models.highlighted or 0) + step) % len(self._found)

    @on(Input.Submitted)
    def typed(self, message: Input.Submitted) -> None:
        """End with the name typed, or with the highlighted model."""
        message.stop()
        at = self.query_one(OptionList).highlighted
        if name := message.value.strip():
            self.dismiss(ModelChoice(name))
        elif at is not None:
            self.dismiss(ModelChoice(self._found[at].path))

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        """End with what was clicked."""
        message.stop()
        self.dismiss(ModelChoice(self._found[message.option_index].path))
