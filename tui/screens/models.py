"""A choice among the models on this machine, or any folder or hub name."""

from __future__ import annotations

import asyncio
import threading
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static

from ring_mlx import harmless
from tui.fuzzy import best
from tui.gauges import counted
from tui.messages import ModelChoice
from tui.models import PLACES, Found, found_models
from tui.screens.dialog import Dialog, Keys
from tui.widgets.choices import Choices, in_columns

SHOW_EVERY_S, MOST_ROWS = 0.1, 500


class ModelsScreen(Dialog[ModelChoice | None]):
    """Ends with a choice, or with nothing.

    Args:
        current: The name of the model in use.
        folders: To look into, besides the usual ones.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Choose", key_display="↑↓", priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("pageup", "move(-8)", show=False, priority=True),
        Binding("pagedown", "move(8)", show=False, priority=True),
        Binding("enter", "use", "Use", priority=True),
        Binding("escape", "dismiss(None)", "Back", priority=True),
    ]

    def __init__(self, current: str, folders: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._current, self._folders = current, folders
        self._models: Choices[Found] = Choices(id="models")
        self._found: list[Found] = []
        self._is_looking = True

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Input(placeholder="Filter, or a folder, or OWNER/NAME on the hub")
            yield self._models
            yield Static("", id="remark", markup=False)
            yield Keys()

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        # Not a worker: the application waits for its threads, and a folder on a dead server never answers.
        threading.Thread(target=self._look, name="models", daemon=True).start()
        self._show()

    def on_unmount(self) -> None:
        self._is_looking = False

    def _look(self) -> None:
        try:
            for found in found_models((*PLACES, *self._folders)) if self._folders else found_models():
                self._found.append(found)
                if not self._is_looking:
                    break
        finally:
            self._is_looking = False

    @work
    async def _show(self) -> None:
        """Show what is found, while the thread looks."""
        shown = 0
        while self._is_looking:
            await asyncio.sleep(SHOW_EVERY_S)
            if len(self._found) > shown:
                shown = len(self._found)
                self._fill()
        self._fill()

    @on(Input.Changed)
    def typed(self, message: Input.Changed) -> None:
        message.stop()
        self._fill(keeps=self._models.has_moved)

    def _fill(self, keeps: bool = True) -> None:
        text, found = self.query_one(Input).value.strip(), list(self._found)
        rows = best(text, found, lambda f: f.name, MOST_ROWS)
        is_new_name = "/" in text and text not in (f.path for f, _ in rows)
        if is_new_name or (text and not rows):
            rows.insert(0, (Found(text, text, "a folder, or a name on the hub"), Content(harmless(text, is_name=True))))
        shown = [(f, self._mark(f), name, (f.remark, f.fit)) for f, name in rows]
        self._models.fill(in_columns(shown, self._models.size.width, shows_end=True), keeps and not is_new_name)
        self._say()

    def _mark(self, found: Found) -> str:
        return "● " if self._current in (found.name, (found.path or "").rpartition("/")[2]) else "  "

    @on(Choices.Widened)
    def widened(self) -> None:
        """Lay the rows out again."""
        self._fill()

    @on(OptionList.OptionHighlighted)
    def highlighted(self) -> None:
        self._say()

    def _say(self) -> None:
        """Show whether the highlighted model fits and where it is, or how many there are."""
        found, more = self._models.chosen, "Looking for more... " if self._is_looking else ""
        about = (
            f"{found.detail} {found.path}" if found is not None and found.detail else counted(len(self._found), "model")
        )
        self.query_one("#remark", Static).update(harmless(more + about, is_name=True))

    def action_move(self, step: int) -> None:
        self._models.move(step)

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.action_use()

    def action_use(self) -> None:
        if (found := self._models.chosen) is not None:
            self.dismiss(ModelChoice(found.path))
