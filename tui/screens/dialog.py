"""What all dialogs have in common."""

from __future__ import annotations

from typing import TypeVar

from textual.await_complete import AwaitComplete
from textual.binding import ActiveBinding
from textual.command import CommandList, CommandPalette
from textual.layout import Layout
from textual.screen import ModalScreen
from textual.widgets import Footer

from tui.widgets.wrapping import WRAPPING

Result = TypeVar("Result")


class Keys(Footer):
    """A footer of as many rows as its keys need."""

    @property
    def layout(self) -> Layout:
        return WRAPPING


class EndsOnce(ModalScreen[Result]):
    """A screen that ends once: another end that comes late would take the screen below away, even the last one."""

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        return super().dismiss(result) if self.is_current else AwaitComplete.nothing()


class Palette(CommandPalette, EndsOnce[None]):
    """Textual's palette."""

    def _action_command_list(self, action: str) -> None:
        # A key may come before the list is laid out, or when it is gone; Textual would fail then.
        if any(found.size.height for found in self.query(CommandList)):
            super()._action_command_list(action)


class Dialog(EndsOnce[Result]):
    """A screen above the chat, which says how large it is, for its style; its own keys come first in the footer."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-middle"), (100, "-wide")]  # noqa: RUF012 as Textual declares it
    VERTICAL_BREAKPOINTS = [(0, "-low"), (18, "-high"), (36, "-tall")]  # noqa: RUF012

    @property
    def active_bindings(self) -> dict[str, ActiveBinding]:
        """Keys in the order in which the dialog declares them, then those of what has the focus."""
        found, own = super().active_bindings, list(self._bindings.key_to_bindings)
        order = {key: own.index(key) if key in own else len(own) for key in found}
        return {key: found[key] for key in sorted(found, key=order.__getitem__)}


class Writing(Dialog[Result]):
    """A dialog in which a text is written; until it is used it is kept as a draft of the chat."""

    @property
    def unsaved(self) -> str:
        """What the user has written, as the prompt would take it, or nothing."""
        raise NotImplementedError
