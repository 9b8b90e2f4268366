"""The chat on the screen: its parts, the question, drafts, and a change to another chat."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, TextArea

from ring_mlx import RingError, harmless
from tui.config import Config, with_prompt_keys
from tui.conversation import Conversation
from tui.front_end import Done, FrontEnd
from tui.keeper import WRITE_EVERY_S, Keeper
from tui.keys import KeysInOrder
from tui.messages import Answering
from tui.screens.dialog import Result, Writing
from tui.store import Attachment, StoreError, Turn, chats, drafts
from tui.store.records import ASSISTANT, USER
from tui.widgets.attachments import Attachments
from tui.widgets.entry import Entry
from tui.widgets.find import FindBar
from tui.widgets.header import Header
from tui.widgets.queued import Queued
from tui.widgets.status import StatusLine
from tui.widgets.turn import AssistantTurn, TurnView
from tui.widgets.turns import Turns
from tui.widgets.welcome import MOST_RECENT

DRAFT_EVERY_S = 1.0


class ChatView(FrontEnd, Screen[None]):
    """Turns, the prompt, the gauges and the keys; `tui.screens.answers` shows what comes."""

    VERTICAL_BREAKPOINTS = [(0, "-low"), (18, "-high")]  # noqa: RUF012 as Textual declares it

    def __init__(self, engine: Answering, keeper: Keeper, config: Config, talk: Conversation | None = None) -> None:
        Screen.__init__(self, id="chat")
        FrontEnd.__init__(self, engine, keeper, config, talk)
        self.turns = Turns(self._branch_of, id="turns")
        self.entry = Entry(with_prompt_keys(config.keys), id="entry")
        self.status, self.header = StatusLine(id="status"), Header(id="header")
        self.find_bar = FindBar()
        self._draft_timer: Timer | None = None  # until what has changed is kept
        self._has_draft = False  # the store has one of this chat
        self._kept: list[Attachment] = []  # what is attached to it there
        self._writing: Writing[Any] | None = None  # is open
        self._left: dict[str, tuple[str, list[Attachment]]] = {}  # what was being written in chats that were left

    def compose(self) -> ComposeResult:
        yield self.header
        yield self.turns
        yield self.find_bar
        yield self.entry
        yield self.status
        yield Footer()

    async def on_mount(self) -> None:
        """Load the model; the user may write, and even send, meanwhile."""
        self.entry.prompt.focus()
        self.set_interval(WRITE_EVERY_S, self._flush)
        self.entry.prompt.remember(self.keeper.recent_questions())
        self.show_header()
        if self.talk.turns:
            await self.show_chat(self.talk)
        self.welcome()
        self.engine.start(self.post_message)
        assert isinstance(self.app, KeysInOrder)
        self.app.call_later(self.app.can_type.set)  # once the prompt has the focus

    def on_unmount(self) -> None:
        """End the answer; its text so far is kept, and the draft."""
        self.stop_now()
        self.keep_draft()

    def say(self, text: str, severity: str = "information") -> None:
        timeout = 20 if severity != "information" else 4
        self.notify(harmless(text), severity=severity, timeout=timeout, markup=False)  # type: ignore[arg-type]

    async def attempt(self, action: Callable[[], Done]) -> None:
        """Run an action; a failure is shown in one line."""
        try:
            if isinstance(done := action(), Awaitable):
                await done
        except RingError as e:
            self.say(str(e), "error")

    @property
    def focused_turn(self) -> Turn | None:
        return self.focused.turn if isinstance(self.focused, TurnView) else None

    def chosen(self, role: str | None = None) -> Turn | None:
        turn = self.focused_turn
        return turn if turn is not None and role in (None, turn.role) else super().chosen(role)

    def chosen_answer(self) -> Turn | None:
        """The answer in focus, or of the question in focus, or the last one; says so if there is none."""
        turn, path = self.chosen(), self.talk.path()
        if turn is not None and turn.role != ASSISTANT and turn in path:
            turn = next(iter(path[path.index(turn) + 1 :]), None)
        return turn or super().chosen_answer()

    def answer_view(self, turn: Turn) -> AssistantTurn | None:
        view = self.turns.view(turn.id)
        return view if isinstance(view, AssistantTurn) else None

    async def refresh_turns(self, focus: str | None = None) -> None:
        """Show the branch in view as it is now."""
        await self.turns.show(self.talk.path(), self.answer.id if self.answer else None)
        if focus is not None:
            await self.turns.go(focus)
        self.refresh_bindings()

    async def open_chat(self, talk: Conversation, at: str | None = None) -> None:
        """Show another chat; a running answer ends and is kept."""
        self.stop_now()
        self.keep_draft()
        draft, attachments, moved = self.entry.prompt.draft, self.entry.attachments.take(), list[Attachment]()
        if not draft and not self.talk.turns:  # no list shows this chat
            attachments, moved = [], attachments
        self._left[self.talk.chat.id] = (draft, attachments)
        await self.show_chat(talk, at)
        for attachment in moved:
            self.entry.attachments.add(attachment)

    async def show_chat(self, talk: Conversation, at: str | None = None) -> None:
        left = self._left.pop(talk.chat.id, None)
        text, attachments = self._draft_of(talk) if left is None else left
        self.talk = talk  # together with its draft: what is typed from here on, or saved, is about this chat
        self._has_draft, self._kept = bool(text), list(attachments)
        self.entry.prompt.begin(text)
        self.entry.attachments.set(attachments)
        self.show_header()
        self.tell_settings()
        self.welcome()
        await self.turns.show(talk.path())
        self.status.show("ready" if self.model.context else self.status.state)
        self.entry.prompt.focus()
        if at is not None:
            await self.turns.go(at)
        self.refresh_bindings()

    def show_header(self) -> None:
        self.header.show(self.talk.chat.title, self.differences, self.other_model)

    def welcome(self) -> None:
        """Show what to begin with, unless there are turns."""
        if self.talk.turns:
            return
        try:
            recent = chats.listed(self.keeper.db, MOST_RECENT + 1)
        except StoreError:
            recent = []
        self.turns.welcome.show(self.model, [c for c in recent if c.id != self.talk.chat.id][:MOST_RECENT])

    def keep_draft(self) -> None:
        """Keep the text that is typed but not sent."""
        if self._draft_timer is not None:
            self._draft_timer.stop()
            self._draft_timer = None
        (draft, attached), chat = self.entry.draft, None if self.talk.turns else self.talk.chat
        draft = "\n".join(filter(None, [self._writing.unsaved if self._writing else "", draft]))
        if draft or chat is None or self._has_draft:
            self._has_draft = bool(draft)
            self.keeper.keep_draft(self.talk.chat.id, draft, chat)
        attachments = attached if draft or chat is None else []
        if attachments != self._kept:
            self._kept = attachments
            self.keeper.keep_attachments(self.talk.chat.id, attachments)

    def write_in(self, screen: Writing[Result | None], done: Callable[[Result | None], None]) -> None:
        """Open a dialog; what is written in it is a part of the draft meanwhile, and comes back if it is not used."""

        def ended(result: Result | None) -> None:
            self._writing = None
            if result is None and self.entry.prompt.put_by(screen.unsaved):
                self.say("Nothing is changed; Up in the prompt brings your text back.")
            done(result)
            self.draft_changed()

        self._writing = screen
        self.app.push_screen(screen, ended)

    def _draft_of(self, talk: Conversation) -> tuple[str, list[Attachment]]:
        db, chat_id = self.keeper.db, talk.chat.id
        try:
            return drafts.load(db, chat_id), drafts.load_attachments(db, chat_id)
        except StoreError:
            return "", []

    def stop_now(self) -> None:
        """End the running answer at once for the chat; its text so far stays."""
        self.engine.stop()
        if self.answer is not None:
            self.entry.unqueue()
            self.end_answer("stopped")

    @on(Entry.Asked)
    async def asked(self, message: Entry.Asked) -> None:
        """Ask; while an answer is running the question waits for its turn."""
        if self.answer is not None:
            self.entry.queue(message.text, message.attachments)
            return
        if not await self._fits(message.text, message.attachments):
            return
        self.talk.mark()
        self.keeper.keep(self.talk, self.talk.add(USER, message.text, message.attachments))
        self.keep_draft()
        await self.attempt(self.ask)

    async def _fits(self, text: str, attachments: list[Attachment]) -> bool:
        """Whether a question fits context and memory; one that does not returns to its draft."""
        talk, messages = self.talk, self.messages_with(text, attachments)
        reason = await asyncio.to_thread(self.refusal, messages) if messages else ""
        if self.talk is not talk:  # the user has not waited
            self.keeper.keep_draft(talk.chat.id, text, None if talk.turns else talk.chat)
            self.keeper.keep_attachments(talk.chat.id, attachments)
            return False
        if reason:
            self.say(reason, "error")
            self.entry.give_back(text, attachments)
        return not reason

    @on(Entry.Trouble)
    def troubled(self, message: Entry.Trouble) -> None:
        self.say(message.text, "error")

    @on(Queued.Changed)
    @on(Attachments.Changed)
    @on(TextArea.Changed)
    def draft_changed(self) -> None:
        """Keep the draft a moment after a change, also while the user goes on typing."""
        if self._draft_timer is None:
            self._draft_timer = self.set_timer(DRAFT_EVERY_S, self.keep_draft)

    def take_back(self, answer: Turn) -> None:
        """Forget an answer without any text; its question returns to the prompt, unless it has other answers."""
        question = self.talk.turns.get(answer.parent or "")
        super().take_back(answer)
        self.return_question(question)

    def return_question(self, question: Turn | None) -> Turn | None:
        returned = super().return_question(question)
        if returned is not None:
            self.entry.give_back(returned.content, returned.attachments)
        return returned

    def action_page(self, pages: int) -> None:
        self.turns.page(pages)

    def action_to_prompt(self) -> None:
        self.entry.prompt.focus()

    def _flush(self) -> None:
        self.keeper.flush()
        self.show_header()
        self.status.unsaved = sum(len(turns) for _, turns in self.keeper.unsaved_turns())

    def _branch_of(self, turn: Turn) -> tuple[int, int]:
        siblings = self.talk.siblings(turn)
        return siblings.index(turn) + 1, len(siblings)
