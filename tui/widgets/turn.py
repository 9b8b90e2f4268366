"""The common base of turns: focus, keys and place among branches."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import Vertical

from tui.commands import COMMANDS
from tui.store import Turn

TURN_BINDINGS: list[BindingType] = [
    Binding(c.turn_key, f"screen.command('{c.name}')", c.label, show=bool(c.label), id=f"turn_{c.name}")
    for c in COMMANDS
    if c.turn_key
]


class TurnView(Vertical, can_focus=True):
    """One turn of the branch in view.

    Args:
        turn: What it shows.
        branch: Its number among its alternatives and their count.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *TURN_BINDINGS,
        Binding("escape,tab", "screen.to_prompt", "Prompt"),
        Binding("pageup", "screen.page(-1)", show=False),
        Binding("pagedown", "screen.page(1)", show=False),
        Binding("space,enter", "screen.command('thought')", show=False),
    ]

    def __init__(self, turn: Turn, branch: tuple[int, int]) -> None:
        super().__init__()
        self.turn, self.branch = turn, branch

    @property
    def branch_text(self) -> str:
        """Such as "branch 2/3", or nothing where there is no choice."""
        at, count = self.branch
        return f"branch {at}/{count}" if count > 1 else ""
