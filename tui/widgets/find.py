"""Search within a chat: the line that one types in, and the marks on what is found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Static

from ring_mlx import harmless
from tui.store import Turn
from tui.widgets.blocks import CopyLabel, Table
from tui.widgets.turn import AssistantTurn, TurnView

HIT, CURRENT = "reverse", "bold underline"  # also without colours
Span = tuple[int, int]
Spot = tuple[Static, Span]  # a widget, and where in its text


def pattern(words: str) -> re.Pattern[str]:
    """Words in upper or lower case, with any spaces or line breaks between them."""
    return re.compile(r"\s+".join(map(re.escape, harmless(words).split())), re.IGNORECASE)


def count(turn: Turn, wanted: re.Pattern[str]) -> int:
    """How often a turn's text has the words; Markdown within them does not matter."""
    text = harmless(turn.content)
    return len(wanted.findall(text)) or len(wanted.findall(re.sub(r"[*_`]", "", text)))


class Marks:
    """What is marked on the screen."""

    def __init__(self) -> None:
        self._marked: dict[Static, tuple[Content, list[Span]]] = {}  # the text as it was, and where
        self._shown: dict[Static, Content] = {}

    def clear(self) -> None:
        """Show everything as it was; text that has changed since is left alone."""
        for static, (before, _) in self._marked.items():
            if isinstance(static, Table):
                static.mark(())
            elif static.is_attached and static.visual is self._shown[static]:
                static.update(before, layout=False)
        self._marked, self._shown = {}, {}

    def show(self, views: list[TurnView], wanted: re.Pattern[str]) -> None:
        """Mark the words in these turns."""
        self.clear()
        for static in (static for view in views for static in _texts(view)):
            before = _text(static)
            if spans := [m.span() for m in wanted.finditer(before.plain)]:
                self._marked[static] = (before, spans)
                self._draw(static)

    def spots(self, view: TurnView) -> list[Spot]:
        """What is marked in a turn, from top to bottom."""
        return [(s, span) for s in _texts(view) if s in self._marked for span in self._marked[s][1]]

    def emphasize(self, spot: Spot) -> None:
        """Mark one of them more than the others."""
        self._draw(*spot)

    def _draw(self, static: Static, current: Span | None = None) -> None:
        before, spans = self._marked[static]
        marks = [(HIT, *span) for span in spans] + ([(CURRENT, *current)] if current else [])
        if isinstance(static, Table):
            static.mark(marks)
            return
        for style, start, end in marks:
            before = before.stylize(style, start, end)
        self._shown[static] = before
        static.update(before, layout=False)


def _texts(view: TurnView) -> list[Static]:
    """The widgets with the text of a turn."""
    inside = view.body if isinstance(view, AssistantTurn) else view
    return [s for s in inside.query(Static) if isinstance(s.visual, Content) and not isinstance(s, CopyLabel)]


def _text(static: Static) -> Content:
    """What a widget shows."""
    text = static.drawn() if isinstance(static, Table) else static.visual
    assert isinstance(text, Content)
    return text


class FindBar(Horizontal):
    """Words to find, and which of how many is shown; hidden until it is wanted."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,down,ctrl+f", "step(1)", "Next", priority=True),
        Binding("up,shift+enter", "step(-1)", "Before", priority=True),
        Binding("escape", "step(0)", "Close", priority=True),
    ]

    class Changed(Message):
        """There are other words to find."""

    @dataclass
    class Stepped(Message):
        """The next one, the previous one, or with 0 the end of the search."""

        step: int

    def __init__(self) -> None:
        super().__init__()
        self.words, self._state = Input(placeholder="Find in this chat", compact=True), Static("", markup=False)
        self.display = False

    def compose(self) -> ComposeResult:
        yield self.words
        yield self._state

    def say(self, text: str) -> None:
        self._state.update(text)

    @on(Input.Changed)
    def typed(self, message: Input.Changed) -> None:
        message.stop()
        self.post_message(self.Changed())

    def on_paste(self, event: events.Paste) -> None:
        event.stop()

    def action_step(self, step: int) -> None:
        self.post_message(self.Stepped(step))
