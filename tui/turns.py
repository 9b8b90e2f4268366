"""The turns of a conversation as widgets; knows text, not where it comes from."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Collapsible, Markdown, Static
from textual.widgets.markdown import MarkdownStream

from tui.harmless import harmless

GREETING = "A new conversation. Thoughts fold to one line above each answer; click it, or Tab and Enter, to read one."


class UserTurn(Static):
    """What the user said."""

    def __init__(self, text: str) -> None:
        super().__init__(harmless(text), markup=False)


class AssistantTurn(Vertical):
    """An answer as it comes: the thought folded to one line, the text as Markdown, a note on how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.thought, self.answer = "", ""
        self._thought_size = ""
        self._thought_view = Static("", markup=False)
        self._fold = Collapsible(self._thought_view, title="thinking", collapsed=True)
        self._body = Markdown()
        self._note = Static("", classes="note", markup=False)
        self._markdown_stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        """The fold above the text, the note below; each appears when it has something to say."""
        self._fold.display = self._body.display = self._note.display = False
        yield self._fold
        yield self._body
        yield self._note

    @property
    def is_blank(self) -> bool:
        """Whether nothing has been written yet."""
        return not (self.thought or self.answer)

    def think(self, text: str, tokens: int, seconds: float) -> None:
        """Add to the thought, which has now so many tokens and took so long."""
        if not tokens:
            return
        self.thought += text
        self._thought_size = f"{seconds:.1f} s, {tokens} tokens"
        self._fold.display = True
        self._fold.title = f"{'thought' if self.answer else 'thinking'} {self._thought_size}"
        if not self._fold.collapsed:
            self.show_thought()

    async def write(self, text: str) -> None:
        """Add to the answer."""
        text = text if self.answer else text.lstrip()
        if not text:
            return
        if self._markdown_stream is None:
            self._close_thought()
            self._body.display = True
            self._markdown_stream = Markdown.get_stream(self._body)
        self.answer += text
        await self._markdown_stream.write(harmless(text))

    async def end(self, note: str = "") -> None:
        """Nothing more will come; what was written stays."""
        self._close_thought()
        self._note.update(note)
        self._note.display = bool(note)
        stream, self._markdown_stream = self._markdown_stream, None
        if stream is not None:
            await stream.stop()

    async def on_unmount(self) -> None:
        """A stream must be stopped."""
        await self.end()

    @on(Collapsible.Expanded)
    def show_thought(self) -> None:
        """Fill the open fold; a closed one is not kept up to date."""
        self._thought_view.update(harmless(self.thought.strip()))

    def _close_thought(self) -> None:
        if self._thought_size:
            self._fold.title = f"thought {self._thought_size}"


class Turns(VerticalScroll, can_focus=False):
    """The conversation, with its end in view until the user scrolls."""

    def compose(self) -> ComposeResult:
        """Something to read before the first turn."""
        yield Static(GREETING, id="greeting")

    def on_mount(self) -> None:
        """Keep the end in view."""
        self.anchor()

    async def add(self, text: str, answer: AssistantTurn) -> None:
        """Show a question above its answer to come."""
        self.query_one("#greeting").display = False
        await self.mount(UserTurn(text), answer)
        self.anchor()

    async def take_back(self) -> None:
        """Remove the last question and its answer."""
        await self.query(UserTurn).last().remove()
        await self.query(AssistantTurn).last().remove()
        self.query_one("#greeting").display = not self.query(UserTurn)

    async def clear(self) -> None:
        """Remove everything."""
        await self.query("UserTurn, AssistantTurn").remove()
        self.query_one("#greeting").display = True
        self.anchor()

    def page(self, pages: int) -> None:
        """Scroll by so many screens."""
        self.scroll_relative(y=pages * self.size.height, animate=False)
