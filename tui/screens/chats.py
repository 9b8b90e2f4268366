"""All chats: search as you type, rename, pin, delete with undo, export, open."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from ring_mlx import harmless
from tui.screens.text import LineScreen
from tui.store import Chat, Database, StoreError, chats, search

Chosen = tuple[str, str | None]


class ChatsScreen(ModalScreen[Chosen | None]):
    """The list; ends with a chat and the turn that was found in it, or with nothing.

    Args:
        db: The store.
        words: To search for at the start.
        current: The chat in view, marked.
        export: Writes a chat to a file.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back", priority=True),
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("pageup", "move(-8)", show=False, priority=True),
        Binding("pagedown", "move(8)", show=False, priority=True),
        Binding("enter", "open", "Open", priority=True),
        Binding("ctrl+r", "rename", "Rename", priority=True, id="chats_rename"),
        Binding("ctrl+t", "pin", "Pin", priority=True, id="chats_pin"),
        Binding("ctrl+x", "delete", "Delete", priority=True, id="chats_delete"),
        Binding("ctrl+z", "undo", "Undo", priority=True, id="chats_undo"),
        Binding("ctrl+e", "export", "Export", priority=True, id="chats_export"),
    ]

    def __init__(self, db: Database, words: str, current: str, export: Callable[[str], str]) -> None:
        super().__init__()
        self._db, self._words, self._current, self._export = db, words, current, export
        self._rows: list[Chosen] = []
        self._deleted: list[str] = []

    def compose(self) -> ComposeResult:
        """The words above the list."""
        with Vertical(classes="dialog"):
            yield Input(self._words, placeholder="Search all chats", id="words")
            yield OptionList(id="found")
            yield Static("", id="remark", markup=False)
            yield Footer()

    def on_mount(self) -> None:
        """Show all chats, or what was asked for."""
        self.query_one(Input).focus()
        self._fill()

    @on(Input.Changed)
    def typed(self, message: Input.Changed) -> None:
        """Search again."""
        message.stop()
        self._fill()

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        """Open what was clicked."""
        message.stop()
        self.action_open()

    def action_move(self, step: int) -> None:
        """Highlight another row."""
        found = self.query_one(OptionList)
        if self._rows:
            found.highlighted = min(max((found.highlighted or 0) + step, 0), len(self._rows) - 1)

    def action_open(self) -> None:
        """End with the highlighted chat."""
        if (row := self._row) is not None:
            self.dismiss(row)

    def action_rename(self) -> None:
        """Ask for another title."""
        if (chat := self._chat) is None:
            return

        def renamed(title: str | None) -> None:
            if title:
                self._change(lambda: chats.rename(self._db, chat.id, title), f"Renamed to {title}.")

        self.app.push_screen(LineScreen("Title of the chat", chat.title), renamed)

    def action_pin(self) -> None:
        """Keep a chat at the top, or no longer."""
        if (chat := self._chat) is not None:
            self._change(
                lambda: chats.pin(self._db, chat.id, not chat.pinned), "Unpinned." if chat.pinned else "Pinned."
            )

    def action_delete(self) -> None:
        """Delete a chat until it is undone."""
        if (row := self._row) is not None:
            self._deleted.append(row[0])
            self._change(lambda: chats.delete(self._db, row[0]), "Deleted; Ctrl+Z brings it back.")

    def action_undo(self) -> None:
        """Bring the chat deleted last back."""
        if self._deleted:
            chat_id = self._deleted.pop()
            self._change(lambda: chats.restore(self._db, chat_id), "Brought back.")

    def action_export(self) -> None:
        """Write a chat to a file."""
        if (row := self._row) is not None:
            self.query_one("#remark", Static).update(harmless(self._export(row[0])))

    @property
    def _row(self) -> Chosen | None:
        at = self.query_one(OptionList).highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None

    @property
    def _chat(self) -> Chat | None:
        """The highlighted chat, as it is now."""
        try:
            return chats.load(self._db, row[0]) if (row := self._row) else None
        except StoreError as e:
            self._fill(str(e))
            return None

    def _change(self, action: Callable[[], None], remark: str) -> None:
        try:
            action()
        except StoreError as e:
            remark = str(e)
        self._fill(remark)

    def _fill(self, remark: str = "") -> None:
        found = self.query_one(OptionList)
        at, words = found.highlighted or 0, self.query_one(Input).value
        try:
            lines = self._search(words) if words.strip() else self._list()
        except StoreError as e:
            lines, remark = [], str(e)
        found.clear_options()
        found.add_options([Option(line) for line in lines])
        found.highlighted = min(at, len(lines) - 1) if lines else None
        count = f"{len(lines)} {'found' if words.strip() else 'chat' if len(lines) == 1 else 'chats'}"
        self.query_one("#remark", Static).update(harmless(remark or count))

    def _list(self) -> list[Content]:
        listed = chats.listed(self._db)
        self._rows = [(c.id, None) for c in listed]
        return [chat_line(c, c.id == self._current, time.time()) for c in listed]

    def _search(self, words: str) -> list[Content]:
        hits = search.find(self._db, words)
        self._rows = [(h.chat, h.turn) for h in hits]
        return [hit_line(h) for h in hits]


def chat_line(chat: Chat, is_current: bool, now: float) -> Content:
    """A chat in a row: pinned or not, title, number of turns, age."""
    mark = "★ " if chat.pinned else "● " if is_current else "  "
    return Content.assemble(
        mark,
        harmless(chat.title or "untitled", is_name=True),
        (f"  {chat.turns} turns · {age(now - chat.changed)}", "$text-muted"),
    )


def hit_line(hit: search.Hit) -> Content:
    """A hit in two rows: the title, and the words where they were said."""
    line = (
        Content(harmless(hit.title or "untitled", is_name=True))
        .append(Content.styled(f"  {hit.role}", "$text-muted"))
        .append("\n  ")
    )
    for n, part in enumerate(harmless(hit.snippet).split(search.OPEN)):
        marked, _, rest = part.partition(search.CLOSE) if n else ("", "", part)
        line = line.append(Content.styled(marked, "bold reverse")).append(rest)
    return line


def age(s: float) -> str:
    """How long ago, in words."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if s >= unit:
            return f"{int(s / unit)} {name} ago"
    return "just now"
