"""All chats with a preview: search as you type, rename, pin, delete with undo, export, open."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static

from ring_mlx import harmless
from tui.fuzzy import best, marked, match
from tui.gauges import age, counted
from tui.screens.dialog import Dialog, Keys
from tui.screens.text import LineScreen
from tui.store import Chat, Database, StoreError, chats, drafts, search, turns
from tui.store.database import Change
from tui.widgets.choices import Choices, in_columns, row
from tui.widgets.preview import preview

MOST_CHATS, MOST_SHOWN, MOST_FOUND = 20_000, 1000, 200
SCROLLBAR, NARROW = 2, 45  # columns
Chosen = tuple[str, str | None]


class ChatsScreen(Dialog[Chosen | None]):
    """The list; ends with a chat and the turn that was found in it, or with nothing.

    Args:
        db: The store.
        words: To search for at the start.
        current: The chat in view, marked.
        export: Writes a chat to a file.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("pageup", "move(-8)", show=False, priority=True),
        Binding("pagedown", "move(8)", show=False, priority=True),
        Binding("enter", "open", "Open", priority=True),
        Binding("escape", "dismiss(None)", "Back", priority=True),
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
        self._all: list[Chat] = []  # that a title may be of; read when something is searched for

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Input(self._words, placeholder="Search all chats", id="words")
            with Container(id="both"):
                yield self._found
                yield Static("", id="preview", markup=False)
            yield Static("", id="remark", markup=False)
            yield Keys()

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self._fill()

    @on(Input.Changed)
    def typed(self, message: Input.Changed) -> None:
        message.stop()
        self._fill(keeps=self._found.has_moved)

    @on(Choices.Widened)
    def widened(self) -> None:
        """Lay the rows out again."""
        self._fill()

    @on(OptionList.OptionHighlighted)
    def highlighted(self) -> None:
        """Show what the highlighted chat is about."""
        shown = Content()
        if (found := self._found.chosen) is not None and (chat := self._chat) is not None:
            try:
                said = turns.exchange(self._db, chat.id, found[1] or chat.leaf or "")
                draft = "" if said else drafts.load(self._db, chat.id)
                shown = preview(chat, said, draft, self.query_one(Input).value, age(time.time() - chat.changed))
            except StoreError as e:
                shown = Content(harmless(str(e)))
        self.query_one("#preview", Static).update(shown)

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
        self._all = []
        self._fill(remark)

    def _fill(self, remark: str = "", keeps: bool = True) -> None:
        words = self.query_one(Input).value.strip()
        rows: list[tuple[Chosen, Content]] = []
        try:
            rows = (
                self._search(words)
                if words
                else self._rows([(c, _title(c)) for c in chats.listed(self._db, MOST_SHOWN)])
            )
        except StoreError as e:
            remark = str(e)
        self._found.fill(rows, keeps)
        self.highlighted()
        count = f"{len(rows)} found" if words else counted(len(rows), "chat")
        if not words and len(rows) >= MOST_SHOWN:
            count = f"the latest {MOST_SHOWN:,} chats; type to search all"
        self.query_one("#remark", Static).update(harmless(remark or count))

    def _search(self, words: str) -> list[tuple[Chosen, Content]]:
        """Chats with all words in their titles, then turns that have them, then chats whose titles match letter by letter."""
        hits = search.find(self._db, words)
        found_in = {h.chat for h in hits}
        self._all = self._all or chats.listed(self._db, MOST_CHATS)
        titles = best(words, (c for c in self._all if c.id not in found_in), lambda c: _title(c).plain, MOST_FOUND)
        named = [t for t in titles if chats.is_called(t[1].plain, words)]
        hits.sort(key=lambda h: not chats.is_called(h.title, words))
        in_turns = [((h.chat, h.turn), hit_line(h, words)) for h in hits]
        return [*self._rows(named), *in_turns, *self._rows([t for t in titles if t not in named])]

    def _rows(self, found: Sequence[tuple[Chat, Content]]) -> list[tuple[Chosen, Content]]:
        """Chats, each in a row: pinned or in view, title, number of turns if there is room, age."""
        now, width = time.time(), self._found.size.width - SCROLLBAR
        rows: list[tuple[Chosen, str, Content, Sequence[str]]] = []
        for c, title in found:
            mark = "★ " if c.pinned else "● " if c.id == self._current else "  "
            remarks = [counted(c.turns, "turn")] if width > NARROW else []
            rows.append(((c.id, None), mark, title, [*remarks, age(now - c.changed)]))
        return in_columns(rows, width)


def _title(chat: Chat) -> Content:
    return Content(harmless(chat.title or "untitled", is_name=True))


def hit_line(hit: search.Hit, words: str) -> Content:
    """A hit in two rows: the title, and the words where they were said."""
    title = harmless(hit.title or "untitled", is_name=True)
    line = row(marked(title, match(words, title)[1]), hit.role).append("\n  ")
    for n, part in enumerate(harmless(hit.snippet).split(search.OPEN)):
        found, _, rest = part.partition(search.CLOSE) if n else ("", "", part)
        line = line.append(Content.styled(found, "bold reverse")).append(rest)
    return line
