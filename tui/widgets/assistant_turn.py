"""An answer as a widget, also while it comes."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.widgets import Static
from textual.widgets.markdown import MarkdownStream

from ring_mlx import harmless
from tui.records import end_words, record_text, thought_size
from tui.store import Turn
from tui.store.exchange import DAMAGED, call_text
from tui.widgets.answer import Answer
from tui.widgets.turn import TurnView

NOTES = {"stopped": "stopped", "failed": "failed"}
FOLDED, OPEN = "▸", "▾"


class Fold(Static):
    """One line about the thought, which a click opens."""

    def on_click(self, event: events.Click) -> None:
        """Open or fold."""
        event.stop()
        turn = self.parent
        if isinstance(turn, AssistantTurn):
            turn.toggle()


class AssistantTurn(TurnView):
    """The thought folded to one line, the text as Markdown, a note on how it ended.

    Args:
        turn: What it shows; while ``running`` it grows.
        branch: Its number among its alternatives and their count.
        running: Whether the answer is still being written.
    """

    def __init__(self, turn: Turn, branch: tuple[int, int], running: bool = False) -> None:
        super().__init__(turn, branch)
        self.running, self.is_open = running, False
        record = turn.record
        self._thought_size = thought_size(record) if record else ""
        self._fold = Fold("", classes="fold", markup=False)
        self._thought = Static("", classes="thought", markup=False)
        self.body = Answer(turn.content)
        self._calls = Answer("\n\n".join(map(call_text, turn.calls)), classes="calls") if turn.calls else None
        self._note = Static("", classes="note", markup=False)
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        """The fold above the text, the note below; each appears when it has something to say."""
        self._refresh_fold()
        self._refresh_note()
        self._thought.display = False
        self.body.display = bool(self.turn.content)
        yield self._fold
        yield self._thought
        yield self.body
        if self._calls is not None:
            yield self._calls
        yield self._note

    def think(self, tokens: int, seconds: float) -> None:
        """Show that the turn's thought has now so many tokens and took so long."""
        if tokens:
            self._thought_size = f"{seconds:.1f} s, {tokens:,} tokens"
            self._refresh_fold()

    async def write(self, text: str) -> None:
        """Show text that has just been added to the turn."""
        if not text:
            return
        if self._stream is None:
            self.body.display = True
            self._refresh_fold()
            self._stream = Answer.get_stream(self.body)
        await self._stream.write(harmless(text))

    def codes(self) -> list[str]:
        """The code of every block, tool calls included, in order."""
        return [*self.body.codes(), *(self._calls.codes() if self._calls is not None else [])]

    async def end(self) -> None:
        """Nothing more will come; what was written stays."""
        self.running = False
        self._refresh_fold()
        self._refresh_note()
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.stop()

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
            NOTES.get(record.finish_reason, "") if record else "",
            end_words(self.turn),
            "edited" if record and record.is_edited else "",
        ]
        parts += [DAMAGED if self.turn.is_damaged else "", self.branch_text, record_text(record) if record else ""]
        self._note.update(harmless(" · ".join(part for part in parts if part)))
        self._note.display = any(parts)

    def _refresh_fold(self) -> None:
        self._fold.display = bool(self._thought_size or self.turn.thinking)
        word = "thinking" if self.running and not self.turn.content else "thought"
        self._fold.update(f"{OPEN if self.is_open else FOLDED} {word} {self._thought_size}".rstrip())
        if self.is_open:
            self._thought.update(harmless(self.turn.thinking.strip()))
