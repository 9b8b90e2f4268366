"""A question or an answer as a widget, also while the answer comes."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from ring_mlx import harmless
from tui.commands import COMMANDS
from tui.formulas.markdown import with_formulas
from tui.gauges import counted
from tui.records import end_words, record_text, thought_size
from tui.store import Turn
from tui.store.exchange import DAMAGED, call_text
from tui.themes import PALE
from tui.widgets.answer import Answer, Stream
from tui.widgets.attachments import attachment_text
from tui.widgets.thought import Tail

SHOWN_CHARACTERS = 4000
FOLDED, OPEN = "▸", "▾"


class TurnView(Vertical, can_focus=True):
    """One turn of the branch in view.

    Args:
        turn: What it shows.
        branch: Its number among its alternatives and their count.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(c.turn_key, f"screen.command('{c.name}')", c.label, show=bool(c.label), id=f"turn_{c.name}")
            for c in COMMANDS
            if c.turn_key
        ),
        Binding("escape,tab", "screen.to_prompt", "Prompt"),
        Binding("pageup", "screen.page(-1)", show=False),
        Binding("pagedown", "screen.page(1)", show=False),
        Binding("space,enter", "screen.command('thought')", show=False),
    ]

    def __init__(self, turn: Turn, branch: tuple[int, int]) -> None:
        super().__init__()
        self.turn, self.branch = turn, branch

    @property
    def branch_text(self) -> str:
        """Such as "branch 2/3", or nothing where there is no choice."""
        at, count = self.branch
        return f"branch {at}/{count}" if count > 1 else ""


class UserTurn(TurnView):
    """A question; a very long text is cut on the screen, but not for the model."""

    def compose(self) -> ComposeResult:
        yield Static(self.content, classes="question")  # one widget, so that a long chat mounts quickly

    @property
    def content(self) -> Content:
        """The text, then attachments and branches in a paler style."""
        text = harmless(self.turn.content)
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
        notes = [
            *map(attachment_text, self.turn.attachments),
            DAMAGED if self.turn.is_damaged else "",
            self.branch_text,
        ]
        shown = "   ".join(filter(None, notes))
        parts = [Content(text) if text else None, Content.styled(shown, PALE) if shown else None]
        return Content("\n").join(part for part in parts if part is not None)


class Fold(Static):
    """One line about the thought, which a click opens."""

    def on_click(self, event: events.Click) -> None:
        event.stop()
        if isinstance(self.parent, AssistantTurn):
            self.parent.toggle()


class AssistantTurn(TurnView):
    """The thought folded to one line, with its end while it comes, the text as Markdown, a note on how it ended.

    Args:
        turn: What it shows; while ``running`` it grows.
        branch: Its number among its alternatives and their count.
        running: Whether the answer is still being written.
    """

    def __init__(self, turn: Turn, branch: tuple[int, int], running: bool = False) -> None:
        super().__init__(turn, branch)
        self.running, self.is_open = running, False
        self._thought_size = thought_size(turn.record) if turn.record else ""
        self._fold = Fold("", classes="fold", markup=False)
        self._tail = Tail()
        self._thought = Static("", classes="thought", markup=False)
        self.body = Answer(turn.content)
        self._calls = Answer("\n\n".join(map(call_text, turn.calls)), classes="calls") if turn.calls else None
        self._note = Static("", classes="note", markup=False)
        self._stream: Stream | None = None

    def compose(self) -> ComposeResult:
        """The fold above the text, the note below; each appears when it has something to say."""
        self._refresh_fold()
        self._refresh_note()
        self._thought.display = False
        self.body.display = bool(self.turn.content)
        yield self._fold
        yield self._tail
        yield self._thought
        yield self.body
        if self._calls is not None:
            yield self._calls
        yield self._note

    def think(self, tokens: int, seconds: float) -> None:
        """Show that the turn's thought has now so many tokens and took so long."""
        if tokens:
            self._thought_size = f"{seconds:.1f} s, {counted(tokens, 'token')}"
            self._refresh_fold()

    async def write(self, text: str) -> None:
        """Show text that has just been added to the turn."""
        if not text:
            return
        if self._stream is None:
            self.body.display = True
            self._refresh_fold()
            self._stream = self.body.stream()
        await self._stream.write(harmless(text))

    def codes(self) -> list[str]:
        """The code of every block, tool calls included, in order."""
        return [*self.body.codes(), *(self._calls.codes() if self._calls is not None else [])]

    async def end(self) -> None:
        """End the answer; its text stays."""
        self.running = False
        self._refresh_fold()
        self._refresh_note()
        await self.on_unmount()

    async def on_unmount(self) -> None:
        """A stream must be stopped."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.stop()

    def toggle(self) -> None:
        """Open or fold the thought."""
        self.is_open = not self.is_open and bool(self.turn.thinking)
        self._thought.display = self.is_open
        self._refresh_fold()

    def _refresh_note(self) -> None:
        record = self.turn.record
        parts = [
            record.finish_reason if record and record.finish_reason in ("stopped", "failed") else "",
            "" if self.running else end_words(self.turn),
            "edited" if record and record.is_edited else "",
            DAMAGED if self.turn.is_damaged else "",
            self.branch_text,
            record_text(record) if record else "",
        ]
        self._note.update(harmless(" · ".join(filter(None, parts))))
        self._note.display = any(parts)

    def _refresh_fold(self) -> None:
        self._fold.display = bool(self._thought_size or self.turn.thinking)
        is_thinking = self.running and not self.turn.content
        word = "thinking" if is_thinking else "thought"
        self._fold.update(f"{OPEN if self.is_open else FOLDED} {word} {self._thought_size}".rstrip())
        self._tail.display = is_thinking and not self.is_open and bool(self.turn.thinking.strip())
        if self._tail.display:
            self._tail.show(self.turn.thinking)
        if self.is_open:
            self._thought.update(with_formulas(harmless(self.turn.thinking.strip())))
