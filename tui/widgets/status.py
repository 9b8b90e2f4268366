"""One line with the model and its gauges."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from ring_mlx import harmless
from tui.gauges import counted, fitted, gauges
from tui.messages import Figures

GAP = 2


class StatusLine(Widget):
    """The model's name on the left; its present work, or its figures, on the right."""

    model: reactive[str] = reactive("")
    context: reactive[int] = reactive(0)
    memory_limit_bytes: reactive[int] = reactive(0)
    forms: reactive[tuple[str, ...]] = reactive(("loading the model",))
    figures: reactive[Figures | None] = reactive(None)
    unsaved: reactive[int] = reactive(0)

    @property
    def state(self) -> str:
        """What the model does, in its longest form."""
        return self.forms[0]

    def show(self, *forms: str) -> None:
        """Show what the model does in place of figures, in the first form that fits."""
        self.forms, self.figures = forms, None

    def render(self) -> Content:
        """The line at the present width; the name is shortened first, what is not saved is not."""
        width = self.size.width
        left = Content(harmless(self.model, is_name=True))
        kept = min(12, left.cell_length) if self.figures is not None else 0
        if self.unsaved:
            left = Content.styled(f"{counted(self.unsaved, 'turn')} not saved", "$text-error")
            kept = left.cell_length
        room = width - kept - GAP if kept else width
        if self.figures is not None:
            right = Content(gauges(self.figures, self.context, self.memory_limit_bytes, room))
        else:
            right = Content(fitted(self.forms, room))
        left = left.truncate(max(width - right.cell_length - GAP, 0), ellipsis=True)
        return Content(" " * max(width - left.cell_length - right.cell_length, 0)).join([left, right])
