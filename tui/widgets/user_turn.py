"""A question as a widget."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.content import Content
from textual.widgets import Static

from ring_mlx import harmless
from tui.store.exchange import DAMAGED
from tui.widgets.attachments import size_text
from tui.widgets.turn import TurnView

SHOWN_CHARACTERS = 4000


class UserTurn(TurnView):
    """What the user said; a very long text is cut, the model has all of it."""

    def compose(self) -> ComposeResult:
        """One text, which is all that a long chat needs to mount."""
        yield Static(self.content, classes="question")

    @property
    def content(self) -> Content:
        """The text, then attachments and branches in a paler style."""
        text = harmless(self.turn.content)
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
        parts = [text] if text else []
        notes = [f"▪ {harmless(a.name, is_name=True)} {size_text(a.text)}" for a in self.turn.attachments]
        notes += [DAMAGED] if self.turn.is_damaged else []
        notes += [self.branch_text] if self.branch_text else []
        if not notes:
            return Content(text)
        return Content("\n").join([*map(Content, parts), Content.styled("   ".join(notes), "$text-muted")])
