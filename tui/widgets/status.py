"""One line with the model and its gauges."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from ring_mlx import harmless
from tui.gauges import gauges
from tui.messages import Figures

GAP = 2


class StatusLine(Widget):
    """The model's name on the left; its present work, or its figures, on the right."""

    model: reactive[str] = reactive("")
    context: reactive[int] = reactive(0)
    memory_limit_bytes: reactive[int] = reactive(0)
    state: reactive[str] = reactive("loading the model")
    figures: reactive[Figures | None] = reactive(None)
    unsaved: reactive[int] = reactive(0)

    def show(self, state: str) -> None:
        """Show what the model does in place of figures."""
        self.state, self.figures = state, None

    def render(self) -> Content:
        """The line at the present width; the name is shortened first."""
        width = self.size.width
        right = Content(self.state)
        if self.figures is not None:
            room = width - GAP - min(12, len(self.model))
            right = Content(gauges(self.figures, self.context, self.memory_limit_bytes, room))
        left = Content(harmless(self.model, is_name=True)).truncate(
            max(width - right.cell_length - GAP, 0), ellipsis=True
        )
        if self.unsaved:
            left = Content.styled(f"{self.unsaved} {'turn' if self.unsaved == 1 else 'turns'} not saved", "$text-error")
        return Content(" " * max(width - left.cell_length - right.cell_length, 0)).join([left, right])
