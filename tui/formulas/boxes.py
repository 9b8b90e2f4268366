"""Blocks of text with a base line, and how they are put together."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.cells import cell_len

MOST_CELLS = 40_000  # of one block; many empty rows beside a wide one would take more than the source has


class UnshownError(Exception):
    """A formula that cannot be shown; its source is shown instead."""


@dataclass(frozen=True)
class Box:
    """Lines of text; ``base`` is the one that stands on the line of the surrounding text."""

    lines: tuple[str, ...] = ("",)
    base: int = 0

    def __post_init__(self) -> None:
        if self.width * self.height > MOST_CELLS:
            raise UnshownError

    @cached_property
    def width(self) -> int:
        """In cells of the terminal."""
        return max(cell_len(line) for line in self.lines)

    @property
    def height(self) -> int:
        return len(self.lines)

    @property
    def text(self) -> str:
        """The only line.

        Raises:
            UnshownError: If there are more.
        """
        if self.height > 1:
            raise UnshownError
        return self.lines[0]


def text_box(text: str) -> Box:
    return Box((unicodedata.normalize("NFC", text),))


def row(boxes: Sequence[Box]) -> Box:
    """Boxes side by side on one base line."""
    if all(box.height == 1 for box in boxes):
        return Box(("".join(box.lines[0] for box in boxes),))
    above = max(box.base for box in boxes)
    height = above + max(box.height - box.base for box in boxes)
    if sum(box.width for box in boxes) * height > MOST_CELLS:
        raise UnshownError
    lines = [""] * height
    for box in boxes:
        top = above - box.base
        for y in range(height):
            line = box.lines[y - top] if 0 <= y - top < box.height else ""
            lines[y] += padded(line, box.width)
    return Box(tuple(line.rstrip() if n != above else line for n, line in enumerate(lines)), above)


def stack(boxes: Sequence[Box], base: int, align: str = "c") -> Box:
    """Boxes on top of each other; the base line is that of box number ``base``."""
    width = max(box.width for box in boxes)
    lines = tuple(padded(line, width, align) for box in boxes for line in box.lines)
    return Box(lines, sum(box.height for box in boxes[:base]) + boxes[base].base)


def grid(rows: Sequence[Sequence[Box]], aligns: str, gaps: Sequence[str] = ("  ",)) -> Box:
    """Cells in columns; ``aligns`` has a letter and ``gaps`` what follows for each column, and both begin again."""
    columns = max(map(len, rows))
    cells = [[*cells, *[Box()] * (columns - len(cells))] for cells in rows]
    widths = [max(r[x].width for r in cells) for x in range(columns)]
    if sum(widths) * len(rows) > MOST_CELLS:
        raise UnshownError
    shown = []
    for r in cells:
        parts = []
        for x, cell in enumerate(r):
            lines = tuple(padded(line, widths[x], aligns[x % len(aligns)]) for line in cell.lines)
            parts += [Box(lines, cell.base), text_box(gaps[x % len(gaps)] if x < columns - 1 else "")]
        shown.append(row(parts))
    lines = tuple(line for box in shown for line in box.lines)
    return Box(lines, (len(lines) - 1) // 2 if len(shown) > 1 else shown[0].base)


BRACKETS = {  # alone, then top, middle and bottom of a tall one, and the centre of a brace
    "(": "(⎛⎜⎝⎜",
    ")": ")⎞⎟⎠⎟",
    "[": "[⎡⎢⎣⎢",
    "]": "]⎤⎥⎦⎥",
    "{": "{⎧⎪⎩⎨",
    "}": "}⎫⎪⎭⎬",
    "⌊": "⌊⎢⎢⎣⎢",
    "⌋": "⌋⎥⎥⎦⎥",
    "⌈": "⌈⎡⎢⎢⎢",
    "⌉": "⌉⎤⎥⎥⎥",
    "|": "|││││",
    "‖": "‖‖‖‖‖",
}


def bracket(kind: str, like: Box) -> Box:
    """A bracket as high as a box; "" is none, and one without tall forms stays small."""
    if like.height == 1 or kind not in BRACKETS:
        return text_box(kind)
    _, top, middle, bottom, centre = tuple(BRACKETS[kind])
    inner = [centre if y == (like.height - 2) // 2 else middle for y in range(like.height - 2)]
    return Box((top, *inner, bottom), like.base)


def bracketed(before: str, box: Box, after: str) -> Box:
    return row([bracket(before, box), box, bracket(after, box)])


def framed(box: Box) -> Box:
    """A box in a frame."""
    edge = "─" * (box.width + 2)
    return Box((f"┌{edge}┐", *(f"│ {padded(line, box.width)} │" for line in box.lines), f"└{edge}┘"), box.base + 1)


def padded(line: str, width: int, align: str = "l") -> str:
    """A line with spaces up to a width; ``align`` is "l", "c" or "r"."""
    room = width - cell_len(line)
    left = {"l": 0, "c": room // 2, "r": room}[align]
    return " " * left + line + " " * (room - left)
