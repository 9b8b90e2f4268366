"""The attachments of the next question, as chips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count

from textual import events
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Static

from ring_mlx import harmless
from tui.store import Attachment


class Chip(Static):
    """One attachment; a click takes it away."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(f"{attachment_text(attachment)} \N{MULTIPLICATION SIGN}", markup=False)
        self.attachment = attachment

    def on_click(self, event: events.Click) -> None:
        event.stop()
        if isinstance(self.parent, Attachments):
            self.parent.set([a for a in self.parent.found if a is not self.attachment])


class Attachments(Horizontal):
    """A row of chips, hidden while there are none."""

    class Changed(Message):
        """There are other attachments now."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attachment] = []
        self.display = False

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
        self.mount_all([Chip(a) for a in self.found])
        self.post_message(self.Changed())

    def take(self) -> list[Attachment]:
        """The attachments, which are then removed."""
        found = self.found
        self.set([])
        return found


def attachment_text(a: Attachment) -> str:
    """Such as "▪ notes.txt 3.2 KB, 81 lines"."""
    size = len(a.text.encode("utf-8", "replace"))
    shown = f"{size} B" if size < 1000 else f"{size / 1000:.1f} KB" if size < 1_000_000 else f"{size / 1e6:.1f} MB"
    return f"▪ {harmless(a.name, is_name=True)} {shown}, {len(a.text.splitlines()):,} lines"
