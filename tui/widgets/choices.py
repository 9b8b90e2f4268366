"""Lists to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from textual import events
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ring_mlx import harmless
from tui.commands import ALSO, COMMANDS, NAMED, first_key
from tui.fuzzy import best
from tui.themes import PALE, TITLE

WIDE, GAP, LEAST_NAME, EVERYTHING = 100, 2, 20, 1000  # columns
Key = TypeVar("Key")


def row(name: str | Content, remark: str, before: str = "") -> Content:
    """A name, which may hold anything, and a paler remark."""
    shown = name if isinstance(name, Content) else Content(harmless(name, is_name=True))
    name_shown = shown.stylize_before(TITLE)
    return Content.assemble(before, name_shown, (f"{'':{GAP}}{harmless(remark, is_name=True)}", PALE))


def in_columns(
    rows: Sequence[tuple[Key, str, Content, Sequence[str]]], width: int, shows_end: bool = False
) -> list[tuple[Key, Content]]:
    """Rows of a mark, a name and remarks, with everything below each other.

    Args:
        rows: Each with its key; all have as many remarks.
        width: Columns in which remarks should fit; a name that is too long for that is cut, but not to less than half.
        shows_end: Cut names at their start.
    """
    count = max((len(r[3]) for r in rows), default=0)
    # A remark with nothing behind it may be longer than its column.
    columns = [[len(r[3][n]) for r in rows if n == count - 1 or any(r[3][n + 1 :])] for n in range(count)]
    widths = [max(lengths, default=0) + GAP for lengths in columns]
    most = max(width - sum(widths) - max((len(r[1]) for r in rows), default=0), min(width // 2, LEAST_NAME))
    names = [_cut(name, most, shows_end) for _, _, name, _ in rows]
    name_width = max((n.cell_length for n in names), default=0)
    return [
        (key, row(name.pad_right(name_width - name.cell_length), _joined(remarks, widths), mark))
        for (key, mark, _, remarks), name in zip(rows, names, strict=True)
    ]


def _cut(name: Content, most: int, shows_end: bool) -> Content:
    if name.cell_length <= most:
        return name
    return Content("…").append(name[1 - most :]) if shows_end else name.truncate(most, ellipsis=True)


def _joined(remarks: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{remark:{width}}" for remark, width in zip(remarks, widths, strict=True)).rstrip()


def command_rows(name: str, keys: Mapping[str, str], width: int) -> list[tuple[str, Content]]:
    """The commands that match a name, each with its key and help, in columns; on a wide screen also what may follow it.

    Args:
        name: What is typed after the slash.
        keys: Remapped ones by command.
        width: Columns of the screen.
    """
    found = best(name, COMMANDS, lambda c: c.name)
    if not found:  # a name that another chat has for it
        also = dict.fromkeys(command for other, command in ALSO.items() if name and other.startswith(name))
        found = [(NAMED[command], Content(command)) for command in also]
    rows = [
        (
            f"/{c.name}",
            "/",
            s.append(f" {c.argument}" if width >= WIDE and c.argument else ""),
            (first_key(c, keys), c.help),
        )
        for c, s in found
    ]
    return in_columns(rows, EVERYTHING)


class Choices(OptionList, Generic[Key]):
    """Rows, each with a key that says what it stands for."""

    @dataclass
    class Widened(Message):
        """The list has another width, in which rows of columns must be laid out again."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.keys: list[Key] = []
        self.has_moved = False  # the user has chosen a row of those shown
        self._width = 0

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self.scroll_to_highlight)  # a message or more keys may have taken its row
        if event.size.width != self._width:
            self._width = event.size.width
            self.post_message(self.Widened())

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

    def offer(self, rows: Iterable[tuple[str, Content]], typed: str = "") -> None:
        """Show texts for what is ``typed``, each as its row shows it; none hides the list."""
        self.typed, found = typed, list(rows)
        self.fill(found, keeps=self.has_moved and self.chosen in [key for key, _ in found])
        self.display = bool(self.keys)
