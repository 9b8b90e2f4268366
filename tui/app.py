"""The chat application: one conversation, one engine; knows messages and widgets, not models."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer

from tui.messages import Answering, Ended, Failed, Loaded, Piece, Reading
from tui.prompt import Prompt
from tui.status import StatusLine
from tui.turns import AssistantTurn, Turns

NOTES = {"length": "cut off: the limit of tokens is reached", "stopped": "stopped"}


class RingChat(App[None]):
    """A conversation with a Ring model.

    Args:
        engine: Not started yet; whoever made it closes it.
    """

    CSS_PATH = "chat.tcss"
    TITLE = "ring-mlx"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+t", "switch_theme", "Light/dark"),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(self, engine: Answering) -> None:
        super().__init__()
        self.conversation: list[dict[str, str]] = []
        self._engine, self._number = engine, 0
        self._turn: AssistantTurn | None = None

    def compose(self) -> ComposeResult:
        """Turns, the prompt, the figures and the keys."""
        yield Turns(id="turns")
        yield Prompt(id="prompt")
        yield StatusLine(id="status")
        yield Footer()

    def on_mount(self) -> None:
        """Load the model; the user may write, and even send, meanwhile."""
        self.query_one(Prompt).focus()
        self._engine.start(self.post_message)

    def on_unmount(self) -> None:
        """Nobody reads the answer any more."""
        self._engine.stop()

    @on(Prompt.Sent)
    async def send(self, message: Prompt.Sent) -> None:
        """Ask, unless an answer is running; the text waits in the prompt then."""
        if self._turn is not None:
            self.notify("An answer is running; Esc stops it.")
            self.query_one(Prompt).give_back(message.text)
            return
        self.conversation.append({"role": "user", "content": message.text})
        self._turn, self._number = AssistantTurn(), self._number + 1
        self.refresh_bindings()
        await self.query_one(Turns).add(message.text, self._turn)
        self._engine.ask(self._number, list(self.conversation))

    @on(Loaded)
    def loaded(self, message: Loaded) -> None:
        """Say which model it is."""
        status = self.query_one(StatusLine)
        status.model, status.context = message.name, message.context
        status.show("ready")

    @on(Reading)
    def reading(self, message: Reading) -> None:
        """Show how far the prompt has been read."""
        if message.number == self._number and self._turn is not None:
            self.query_one(StatusLine).show(f"reading {message.done:,} of {message.total:,} tokens")

    @on(Piece)
    async def piece(self, message: Piece) -> None:
        """Show new text and figures."""
        if message.number == self._number and self._turn is not None:
            self.query_one(StatusLine).figures = message.figures
            self._turn.think(message.thinking_text, message.thinking_tokens, message.thinking_s)
            await self._turn.write(message.answer_text)

    @on(Ended)
    async def ended(self, message: Ended) -> None:
        """Keep the answer, whole or not."""
        if message.number == self._number:
            await self._end(NOTES.get(message.reason, ""), keep_blank=message.reason == "stop")

    @on(Failed)
    async def failed(self, message: Failed) -> None:
        """Say what went wrong; nothing that was written is lost."""
        self.notify(message.text, title="Failed", severity="error", timeout=30, markup=False)
        if message.number is None:
            self.query_one(StatusLine).show("no model")
            self.query_one(Prompt).disabled = True
        if message.number in (None, self._number):
            await self._end("failed", keep_blank=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the key that stops while there is nothing to stop."""
        return None if action == "stop" and self._turn is None else True

    def action_stop(self) -> None:
        """End the running answer; what was written stays."""
        self._engine.stop()

    async def action_new(self) -> None:
        """Start a new conversation."""
        self._engine.stop()
        self._turn = None
        self.conversation = []
        await self.query_one(Turns).clear()
        status = self.query_one(StatusLine)
        status.show("ready" if status.context else status.state)
        self.refresh_bindings()

    def action_page(self, pages: int) -> None:
        """Scroll the conversation while the prompt keeps the focus."""
        self.query_one(Turns).page(pages)

    def action_switch_theme(self) -> None:
        """Switch between dark and light."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    async def _end(self, note: str, keep_blank: bool) -> None:
        turn, self._turn = self._turn, None
        if turn is None:
            return
        self.refresh_bindings()
        await turn.end(note)
        if turn.is_blank and not keep_blank:
            await self.query_one(Turns).take_back()
            self.query_one(Prompt).give_back(self.conversation.pop()["content"])
        else:
            self.conversation.append({"role": "assistant", "content": turn.answer})
