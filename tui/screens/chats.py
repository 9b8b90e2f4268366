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

from ring_mlx import harmless
from tui.screens.text import LineScreen
from tui.store import Chat, Database, StoreError, chats, search
from tui.store.database import Change
from tui.widgets.choices import Choices, row

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
        self._found: Choices[Chosen] = Choices(id="found")
        self._deleted: list[str] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Input(self._words, placeholder="Search all chats", id="words")
            yield self._found
            yield Static("", id="remark", markup=False)
            yield Footer()

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self._fill()

    @on(Input.Changed)
    def typed(self, message: Input.Changed) -> None:
        message.stop()
        self._fill(keeps=self._found.has_moved)

    @on(OptionList.OptionSelected)
    def clicked(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.action_open()

    def action_move(self, step: int) -> None:
        self._found.move(step, around=False)

    def action_open(self) -> None:
        if (found := self._found.chosen) is not None:
            self.dismiss(found)

    def action_rename(self) -> None:
        if (chat := self._chat) is None:
            return

        def renamed(title: str | None) -> None:
            if title:
                self._change(chats.renaming(chat.id, title), f"Renamed to {title}.")

        self.app.push_screen(LineScreen("Title of the chat", chat.title), renamed)

    def action_pin(self) -> None:
        if (chat := self._chat) is not None:
            self._change(chats.pinning(chat.id, not chat.pinned), "Unpinned." if chat.pinned else "Pinned.")

    def action_delete(self) -> None:
        if (found := self._found.chosen) is not None:
            self._deleted.append(found[0])
            self._change(chats.deleting(found[0]), "Deleted; Ctrl+Z brings it back.")

    def action_undo(self) -> None:
        if self._deleted:
            self._change(chats.restoring(self._deleted.pop()), "Brought back.")

    def action_export(self) -> None:
        if (found := self._found.chosen) is not None:
            self.query_one("#remark", Static).update(harmless(self._export(found[0])))

    @property
    def _chat(self) -> Chat | None:
        """The highlighted chat, as it is now."""
        try:
            return chats.load(self._db, found[0]) if (found := self._found.chosen) else None
        except StoreError as e:
            self._fill(str(e))
            return None

    def _change(self, change: Change, remark: str) -> None:
        try:
            self._db.write(change)
        except StoreError as e:
            remark = str(e)
        self._fill(remark)

    def _fill(self, remark: str = "", keeps: bool = True) -> None:
        words = self.query_one(Input).value
        rows: list[tuple[Chosen, Content]] = []
        try:
            if words.strip():
                rows = [((h.chat, h.turn), hit_line(h)) for h in search.find(self._db, words)]
            else:
                now = time.time()
                rows = [((c.id, None), chat_line(c, c.id == self._current, now)) for c in chats.listed(self._db)]
        except StoreError as e:
            remark = str(e)
        self._found.fill(rows, keeps)
        count = f"{len(rows)} {'found' if words.strip() else 'chat' if len(rows) == 1 else 'chats'}"
        self.query_one("#remark", Static).update(harmless(remark or count))


def chat_line(chat: Chat, is_current: bool, now: float) -> Content:
    """A chat in a row: pinned or not, title, number of turns, age."""
    mark = "★ " if chat.pinned else "● " if is_current else "  "
    return row(chat.title or "untitled", f"{chat.turns} turns · {age(now - chat.changed)}", mark)


def hit_line(hit: search.Hit) -> Content:
    """A hit in two rows: the title, and the words where they were said."""
    line = row(hit.title or "untitled", hit.role).append("\n  ")
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
