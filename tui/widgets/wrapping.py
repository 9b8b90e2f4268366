"""A layout of widgets of one row side by side, in as many rows as they need."""

from __future__ import annotations

from textual.geometry import Region, Size
from textual.layout import WidgetPlacement
from textual.layouts.horizontal import HorizontalLayout
from textual.widget import Widget

GAP = 2


class Wrapping(HorizontalLayout):
    """Begins another row where a widget does not fit behind the one before."""

    def arrange(self, parent: Widget, children: list[Widget], size: Size, greedy: bool = True) -> list[WidgetPlacement]:
        placed, at, row = [], 0, 0
        for p in super().arrange(parent, children, size, greedy):
            width = min(p.region.width, size.width)
            if at and at + width > size.width:
                at, row = 0, row + 1
            placed.append(p._replace(region=Region(at, row, width, 1)))
            at += width + GAP
        return placed


WRAPPING = Wrapping()
