"""The attachments of the next question, as chips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count

from rich.cells import cell_len, set_cell_size
from textual import events, work
from textual.containers import Container
from textual.content import Content
from textual.layout import Layout
from textual.message import Message
from textual.widgets import Static

from ring_mlx import harmless
from tui.gauges import counted
from tui.parts import file_size_text
from tui.store import Attachment
from tui.widgets.wrapping import WRAPPING

PREVIEW_LINES, PREVIEW_COLUMNS, LEAST_NAME = 12, 72, 8


class Chip(Static):
    """One attachment with the tokens that it takes, once they are counted; a click takes it away."""

    def __init__(self, attachment: Attachment, tokens: int | None = None) -> None:
        super().__init__(markup=False)
        self.attachment, self.tokens = attachment, tokens
        lines = attachment.text[: PREVIEW_LINES * PREVIEW_COLUMNS * 4].split("\n")
        shown = [line[:PREVIEW_COLUMNS] for line in lines[:PREVIEW_LINES]]
        self.tooltip = Content(harmless("\n".join([*shown, "…"] if len(lines) > PREVIEW_LINES else shown)))

    def on_mount(self) -> None:
        self.show()

    def show(self) -> None:
        """Show the name, cut in its middle where the screen is too narrow, and what it takes."""
        text = attachment_text(self.attachment, self.tokens, self.app.size.width - 5)
        self.update(f"{text} \N{MULTIPLICATION SIGN}")

    @property
    def text(self) -> str:
        return attachment_text(self.attachment, self.tokens)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        self.take_away()

    def take_away(self) -> None:
        """Attach it no longer."""
        if isinstance(self.parent, Attachments):
            self.parent.set([a for a in self.parent.found if a is not self.attachment])


class Attachments(Container):
    """Chips in as many rows as they need, hidden while there are none."""

    class Changed(Message):
        """There are other attachments now."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attachment] = []
        self.display = False
        self._count: Callable[[str], int | None] = lambda text: None
        self._tokens: dict[Attachment, int] = {}

    @property
    def layout(self) -> Layout:
        return WRAPPING

    def count_with(self, counted: Callable[[str], int | None]) -> None:
        """Use another function to count tokens, and count what is attached again; it may be slow."""
        self._count, self._tokens = counted, {}
        self._count_tokens(counted, self.found)

    @work(thread=True, exclusive=True, group="tokens")
    def _count_tokens(self, counted: Callable[[str], int | None], wanted: Sequence[Attachment]) -> None:
        for attachment in wanted:
            if attachment in self.found and attachment not in self._tokens:
                tokens = counted(attachment.text)
                self.call_later(self._counted, counted, attachment, tokens)

    def _counted(self, counted: Callable[[str], int | None], attachment: Attachment, tokens: int | None) -> None:
        if counted is not self._count or tokens is None or attachment not in self.found:
            return
        self._tokens[attachment] = tokens
        for chip in self.chips:
            if chip.attachment == attachment:
                chip.tokens = tokens
                chip.show()

    @property
    def chips(self) -> list[Chip]:
        return list(self.query(Chip))

    def on_resize(self) -> None:
        for chip in self.chips:
            chip.show()

    def add(self, attachment: Attachment) -> None:
        """Attach a text once; another text of the same name gets a number."""
        if attachment not in self.found:
            taken = {a.name for a in self.found}
            numbered = (f"{attachment.name} ({n})" for n in count(2))
            name = next(n for n in chain([attachment.name], numbered) if n not in taken)
            self.set([*self.found, replace(attachment, name=name)])

    def set(self, attachments: Sequence[Attachment]) -> None:
        """Attach these and no others."""
        self.found = list(attachments)
        self.display = bool(self.found)
        self.remove_children()
        self._tokens = {a: n for a, n in self._tokens.items() if a in self.found}
        self.mount_all([Chip(a, self._tokens.get(a)) for a in self.found])
        self.post_message(self.Changed())
        if self.found:
            self._count_tokens(self._count, self.found)

    def take(self) -> list[Attachment]:
        """The attachments, which are then removed."""
        found = self.found
        self.set([])
        return found


def attachment_text(a: Attachment, tokens: int | None = None, room: int = 1000) -> str:
    """Such as "▪ notes.txt 3.2 KB, 81 lines, 1,204 tokens", with a shorter name if there is less room."""
    size, lines = file_size_text(len(a.text.encode("utf-8", "replace"))), counted(len(a.text.splitlines()), "line")
    takes = [size, lines] if tokens is None else [size, lines, counted(tokens, "token")]
    name = harmless(a.name, is_name=True)
    if min(cell_len(name), LEAST_NAME) + len(", ".join(takes)) + 3 > room:
        takes = takes[-1:]
    if cell_len(name) > (most := max(room - len(", ".join(takes)) - 3, LEAST_NAME)):
        name = f"{set_cell_size(name, most // 2 - 1).rstrip()}…{_end(name, most - most // 2)}"
    return f"▪ {name} {', '.join(takes)}"


def _end(name: str, most: int) -> str:
    while cell_len(name) > most:
        name = name[1:]
    return name
