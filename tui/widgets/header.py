"""One line with a chat's title and what is otherwise in it than in new ones; hidden where nothing is."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from ring_mlx import harmless

GAP = " · "
LEAST_TITLE = 12  # columns


class Header(Widget):
    """The title on the left, the differences on the right, as many as fit."""

    title: reactive[str] = reactive("")
    differences: reactive[tuple[str, ...]] = reactive(())
    warning: reactive[str] = reactive("")

    def show(self, title: str, differences: Sequence[str], warning: str = "") -> None:
        """Show these, the warning first."""
        self.title, self.differences, self.warning = title, tuple(differences), warning
        self.display = bool(differences or warning)

    def render(self) -> Content:
        """The line at the present width; the title is shortened first, then the last differences are left out."""
        width, named = self.size.width, Content(harmless(self.title or "New chat", is_name=True))
        room = width - min(max(LEAST_TITLE, width // 4), named.cell_length) - len(GAP)
        right = Content.styled(harmless(self.warning, is_name=True), "$text-error").truncate(room, ellipsis=True)
        for n, words in enumerate(self.differences):
            added = Content(GAP if right.cell_length else "").append(harmless(words, is_name=True))
            more = len(self.differences) - n - 1
            rest = f"{GAP}+{more}" if more else ""
            left_over = room - right.cell_length - len(rest)
            if added.cell_length > left_over and right.cell_length:
                right = right.append(f"{GAP}+{more + 1}")
                break
            right = right.append(added.truncate(left_over, ellipsis=True))
            if added.cell_length > left_over:
                right = right.append(rest)
                break
        left = named.stylize("bold $foreground").truncate(max(width - right.cell_length - len(GAP), 0), ellipsis=True)
        return Content(" " * max(width - left.cell_length - right.cell_length, 0)).join([left, right])
