"""A short list of completions for what is typed."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ring_mlx import harmless


class Completion(OptionList, can_focus=False):
    """The list above the prompt; the prompt keeps the focus and moves the highlight."""

    def __init__(self) -> None:
        super().__init__()
        self.display = False
        self.typed = ""
        self._texts: list[str] = []

    def offer(self, found: Sequence[tuple[str, str]], typed: str = "") -> None:
        """Show texts, each with a remark, for what is ``typed``; none hides the list."""
        self.typed = typed
        self._texts = [text for text, _ in found]
        self.display = bool(found)
        self.clear_options()
        self.add_options([Option(_line(text, remark)) for text, remark in found])
        self.highlighted = 0 if found else None

    @property
    def chosen(self) -> str | None:
        """The highlighted text."""
        return self._texts[self.highlighted] if self.display and self.highlighted is not None else None

    def move(self, step: int) -> None:
        """Highlight the next or previous one, round and round."""
        if self._texts:
            self.highlighted = ((self.highlighted or 0) + step) % len(self._texts)


def _line(text: str, remark: str) -> Content:
    return Content(harmless(text, is_name=True)).append(Content.styled(f"  {harmless(remark)}", "$text-muted"))
