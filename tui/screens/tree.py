"""A chat's turns as a tree: the branch in view runs straight down, others are indented below the turn that they leave."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static

from tui.conversation import Conversation, first_line
from tui.screens.dialog import Dialog, Keys
from tui.store import Turn
from tui.store.records import USER
from tui.widgets.choices import Choices, row

END, HERE, ELSEWHERE = "◉ ", "● ", "○ "
SHOWN_CHARACTERS, MOST_LEVELS = 200, 6


class TreeScreen(Dialog[str | None]):
    """Ends with the id of a turn to go to, or with nothing.

    Args:
        talk: The chat.
        at: The turn that is chosen at first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back", priority=True),
        Binding("enter", "go", "Go", priority=True),
        Binding("left", "branch(-1)", "Branches", key_display="←→", priority=True),
        Binding("right", "branch(1)", show=False, priority=True),
    ]

    def __init__(self, talk: Conversation, at: str | None) -> None:
        super().__init__()
        self._talk, self._at = talk, at
        self._rows: Choices[str] = Choices(id="tree")
        self._starts: list[int] = []  # rows at which a branch begins

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(f"{END}here, {HERE}its branch, {ELSEWHERE}others", classes="title")
            yield self._rows
            yield Keys()

    def on_mount(self) -> None:
        """Show all turns; the one in view is chosen."""
        path, leaf = {t.id for t in self._talk.path()}, self._talk.chat.leaf
        found = rows(self._talk)
        self._starts = [n for n, (_, _, is_start) in enumerate(found) if is_start]
        self._rows.fill([(t.id, _line(t, level, starts, path, leaf)) for t, level, starts in found])
        if self._at in self._rows.keys:
            self._rows.highlighted = self._rows.keys.index(self._at)
        self._rows.focus()

    def action_go(self) -> None:
        self.dismiss(self._rows.chosen)

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.action_go()

    def action_branch(self, step: int) -> None:
        """Choose the next or the previous turn at which a branch begins."""
        at = self._rows.highlighted or 0
        ahead = [n for n in self._starts[::step] if (n - at) * step > 0]
        if ahead:
            self._rows.highlighted = ahead[0]


def rows(talk: Conversation) -> list[tuple[Turn, int, bool]]:
    """Every turn in the order shown, with how many branches lead away from that in view, and whether it begins one.

    Of a turn's continuations the one in view, or else the newest, comes last and is not indented.
    """
    path, found = {t.id for t in talk.path()}, []
    waiting = _continued(talk, None, 0, path)[::-1]
    while waiting:
        turn, level, starts = waiting.pop()
        found.append((turn, level, starts))
        waiting += _continued(talk, turn.id, level, path)[::-1]
    return found


def _continued(talk: Conversation, turn_id: str | None, level: int, path: set[str]) -> list[tuple[Turn, int, bool]]:
    children = talk.continuations(turn_id)
    main = next((c for c in children if c.id in path), children[-1] if children else None)
    side = [(c, level + 1, True) for c in children if c is not main]
    return [*side, *([(main, level, bool(side))] if main is not None else [])]


def _line(turn: Turn, level: int, starts: bool, path: set[str], leaf: str | None) -> Content:
    mark = END if turn.id == leaf else HERE if turn.id in path else ELSEWHERE
    hidden = level - MOST_LEVELS
    lines = f"{hidden}⋯" + "│ " * MOST_LEVELS if hidden > 0 else "│ " * level
    lines = f"{lines[:-2]}├─" if level and starts else lines
    said = turn.content or " ".join(a.name for a in turn.attachments) or turn.thinking
    name = first_line(said[:SHOWN_CHARACTERS]) or "(no text)"
    return row(f"{'> ' if turn.role == USER else '  '}{name}", "", f"{mark}{lines}")
