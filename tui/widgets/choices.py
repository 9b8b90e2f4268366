"""Lists to choose from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ring_mlx import harmless

Key = TypeVar("Key")


def row(name: str, remark: str, before: str = "") -> Content:
    """A name, which may hold anything, and a paler remark."""
    return Content.assemble(
        before, harmless(name, is_name=True), (f"  {harmless(remark, is_name=True)}", "$text-muted")
    )


class Choices(OptionList, Generic[Key]):
    """Rows, each with a key that says what it stands for."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.keys: list[Key] = []
        self.has_moved = False  # the user has chosen a row of those shown

    def fill(self, rows: Iterable[tuple[Key, Content]], keeps: bool = True) -> None:
        """Show other rows; the highlight stays on its key, or at its place, or ``keeps`` nothing and is on the first."""
        found, at, key = list(rows), self.highlighted or 0, self.chosen
        self.keys = [key for key, _ in found]
        self.has_moved = self.has_moved and keeps and key in self.keys
        self.clear_options()
        self.add_options([Option(shown) for _, shown in found])
        at = self.keys.index(key) if key in self.keys else min(at, len(found) - 1)
        self.highlighted = (at if keeps else 0) if found else None

    @property
    def chosen(self) -> Key | None:
        """The key of the highlighted row."""
        return self.keys[self.highlighted] if self.highlighted is not None else None

    def move(self, step: int, around: bool = True) -> None:
        """Highlight another row; ``around`` goes from the last one to the first."""
        if self.keys:
            self.has_moved = True
            at = (self.highlighted or 0) + step
            self.highlighted = at % len(self.keys) if around else min(max(at, 0), len(self.keys) - 1)


class Completion(Choices[str], can_focus=False):
    """Completions of what is typed; the prompt below keeps the focus and moves the highlight."""

    def __init__(self) -> None:
        super().__init__()
        self.display = False
        self.typed = ""

    def offer(self, found: Iterable[tuple[str, str]], typed: str = "") -> None:
        """Show texts, each with a remark, for what is ``typed``; none hides the list."""
        self.typed = typed
        self.fill([(text, row(text, remark)) for text, remark in found], keeps=self.has_moved)
        self.display = bool(self.keys)
