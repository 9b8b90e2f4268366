"""The end of a thought while it comes."""

from __future__ import annotations

from textual.content import Content
from textual.geometry import Size
from textual.widgets import Static

from ring_mlx import harmless
from tui.formulas.markdown import with_formulas

LINES, MOST = 3, 2000  # lines of the tail; letters that are looked at for them
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Tail(Static):
    """The last lines of a thought, with a sign that turns with each update."""

    def __init__(self) -> None:
        super().__init__("", classes="tail", markup=False)
        self._text, self._turn = "", 0
        self.display = False

    def show(self, thought: str) -> None:
        """Show the end of a thought that goes on."""
        before = self.get_content_height(self.size, self.size, self.content_size.width)
        self._turn += 1
        self._text = with_formulas(harmless(thought[-MOST:]))
        after = self.get_content_height(self.size, self.size, self.content_size.width)
        self.refresh(layout=before != after)

    def render(self) -> Content:
        lines = self._lines(self.content_size.width)
        signs = [*["  "] * (len(lines) - 1), f"{FRAMES[self._turn % len(FRAMES)]} "]
        return Content("\n").join([Content(sign) + line for sign, line in zip(signs, lines, strict=True)])

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._lines(width))

    def _lines(self, width: int) -> list[Content]:
        """The last lines that have something on them; the first letters may be within a word."""
        lines: list[Content] = []
        for line in reversed(self._text.split("\n")):
            if line.strip() and len(lines) < LINES:
                lines = [*Content(line.rstrip()).wrap(max(width - 2, 1)), *lines]
        return lines[-LINES:]
