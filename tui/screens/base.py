"""What every layer of the chat screen shares: the engine, the store, the configuration and the chat in view."""

from __future__ import annotations

from textual.screen import Screen

from ring_mlx import harmless
from tui.config import Config
from tui.config.schema import prompt_keys
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Answering, Loaded
from tui.store import Turn
from tui.store.records import ASSISTANT
from tui.widgets.assistant_turn import AssistantTurn
from tui.widgets.entry import Entry
from tui.widgets.status import StatusLine
from tui.widgets.turn import TurnView
from tui.widgets.turns import Turns

BUSY = "An answer is running; Esc stops it."


class ChatBase(Screen[None]):
    """One chat, one engine.

    Args:
        engine: Not started yet; whoever made it closes it.
        keeper: Keeps what is said.
        config: Settings at the start.
        talk: The chat to begin with, by default a new one.
    """

    def __init__(self, engine: Answering, keeper: Keeper, config: Config, talk: Conversation | None = None) -> None:
        super().__init__(id="chat")
        self.engine, self.keeper, self.config = engine, keeper, config
        self.sampling, self.system_prompt = config.sampling, config.system_prompt
        self.talk = talk or Conversation()
        self.model = Loaded("", 0)
        self.number = 0
        self.answer: Turn | None = None
        self.turns = Turns(self.branch_of, id="turns")
        self.entry = Entry(prompt_keys(config.keys), id="entry")
        self.status = StatusLine(id="status")

    def say(self, text: str, severity: str = "information") -> None:
        """Show one line for a while."""
        timeout = 20 if severity != "information" else 4
        self.notify(harmless(text), severity=severity, timeout=timeout, markup=False)  # type: ignore[arg-type]

    def trouble(self, text: str) -> None:
        """Show what went wrong."""
        self.say(text, "error")

    def branch_of(self, turn: Turn) -> tuple[int, int]:
        """A turn's number among its alternatives and their count."""
        siblings = self.talk.siblings(turn)
        return siblings.index(turn) + 1, len(siblings)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is running; says so."""
        if self.answer is not None:
            self.say(BUSY)
        return self.answer is not None

    def chosen(self, role: str | None = None) -> Turn | None:
        """The turn in focus, or the last one of a role."""
        view = self.focused if isinstance(self.focused, TurnView) else None
        if view is not None and role in (None, view.turn.role):
            return view.turn
        return next((t for t in reversed(self.talk.path()) if role in (None, t.role)), None)

    def chosen_answer(self) -> Turn | None:
        """The answer in focus, that of the question in focus, or the last one; says where there is none."""
        turn = self.chosen(None)
        path = self.talk.path()
        if turn is not None and turn.role != ASSISTANT and turn in path:
            turn = next(iter(path[path.index(turn) + 1 :]), None)
        found = turn or self.chosen(ASSISTANT)
        if found is None:
            self.say("There is no answer yet.")
        return found

    def answer_view(self, turn: Turn) -> AssistantTurn | None:
        """An answer's widget, if it is mounted."""
        view = self.turns.view(turn.id)
        return view if isinstance(view, AssistantTurn) else None

    async def refresh_turns(self, focus: str | None = None) -> None:
        """Show the branch in view anew."""
        await self.turns.show(self.talk.path(), self.answer.id if self.answer else None)
        if focus is not None:
            await self.turns.go(focus)
        self.refresh_bindings()

    def action_page(self, pages: int) -> None:
        """Scroll the conversation while the focus stays."""
        self.turns.page(pages)

    def action_to_prompt(self) -> None:
        """Go on writing."""
        self.entry.prompt.focus()
