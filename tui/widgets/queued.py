"""Messages that wait until the running answer has ended."""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Static

from ring_mlx import harmless
from tui.store import Attachment
from tui.widgets.attachments import attachment_text

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Waiting:
    """A question that is not asked yet."""

    text: str
    attachments: tuple[Attachment, ...] = ()

    @property
    def line(self) -> str:
        """Its beginning, for one row."""
        shown = " ".join(harmless(self.text[:SHOWN_CHARACTERS]).split())
        return "  ".join(filter(None, [shown, *map(attachment_text, self.attachments)]))


class Row(Static):
    """One of them; a click takes it back."""

    def __init__(self, waiting: Waiting, number: int, is_last: bool) -> None:
        hint = " · Up takes it back" if is_last else ""
        super().__init__(f"next {number}{hint} · {waiting.line}", markup=False)
        self.waiting = waiting

    def on_click(self, event: events.Click) -> None:
        event.stop()
        self.post_message(Queued.Wanted(self.waiting))


class Queued(VerticalScroll, can_focus=False):
    """A row each, the one that is asked first on top; hidden while there are none."""

    @dataclass
    class Wanted(Message):
        """The user wants one back."""

        waiting: Waiting

    class Changed(Message):
        """There are others now."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Waiting] = []
        self.display = False

    def set(self, found: list[Waiting]) -> None:
        """Have these wait."""
        self.found = found
        self.display = bool(found)
        self.remove_children()
        self.mount_all([Row(w, n, n == len(found)) for n, w in enumerate(found, 1)])
        self.scroll_end(animate=False)
        self.post_message(self.Changed())

    def take(self, *wanted: Waiting) -> list[Waiting]:
        """Those that are wanted and still wait; they do not any more."""
        taken = [w for w in self.found if any(w is one for one in wanted)]
        if taken:
            self.set([w for w in self.found if all(w is not one for one in taken)])
        return taken
