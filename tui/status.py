"""One line with the model and the figures of its last answer; knows how to fit them, not where they come from."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from tui.messages import Figures

WIDE, GAP = 110, 2


class StatusLine(Widget):
    """The model's name on the left; what it does, or how it did, on the right."""

    model: reactive[str] = reactive("")
    context: reactive[int] = reactive(0)
    state: reactive[str] = reactive("loading the model")
    figures: reactive[Figures | None] = reactive(None)

    def show(self, state: str) -> None:
        """Show what the model does in place of figures."""
        self.state, self.figures = state, None

    def render(self) -> Content:
        """The line at the present width; the name gives way first."""
        width = self.size.width
        right = Content(self.state)
        if self.figures is not None:
            right = Content(figures_text(self.figures, self.context, wide=width >= WIDE))
        left = Content(self.model).truncate(max(width - right.cell_length - GAP, 0), ellipsis=True)
        return Content(" " * max(width - left.cell_length - right.cell_length, 0)).join([left, right])


def figures_text(f: Figures, context: int, wide: bool) -> str:
    """Speeds, the wait for the first token, the context used and the memory, in at most 86 or 63 columns."""
    if wide:
        return (
            f"read {f.prompt_tps:,.0f} tok/s · write {f.generation_tps:,.0f} tok/s · first {_seconds(f)} · "
            f"context {f.context_tokens:,}/{context:,} · {f.peak_memory:.2f} GB"
        )
    return (
        f"read {f.prompt_tps:.0f} write {f.generation_tps:.0f} tok/s · first {_seconds(f)} · "
        f"{_short(f.context_tokens)}/{_short(context)} · {f.peak_memory:.1f} GB"
    )


def _seconds(f: Figures) -> str:
    s = f.time_to_first_token_s
    return f"{s:.2f} s" if s < 10 else f"{s:.0f} s"


def _short(tokens: int) -> str:
    return str(tokens) if tokens < 10_000 else f"{tokens / 1000:.0f}k"
