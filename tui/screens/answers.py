"""The running answer on the screen: what the engine says of it, from the question to its end."""

from __future__ import annotations

from time import monotonic

from textual import on

from tui.gauges import loading_text, reading_forms
from tui.interrupts import Interrupts
from tui.messages import Ended, Failed, Loaded, Loading, Piece, Question, Reading
from tui.screens.view import ChatView
from tui.store import Turn
from tui.widgets.entry import Entry

GOES_ON = ("stop", "length")  # how an answer ends after which questions that wait are asked


class AnswerView(ChatView):
    """Shows what the engine says; `tui.screens.chat` adds the commands."""

    _asked_at = 0.0

    async def send(self, question: Question) -> None:
        assert self.answer is not None
        self.entry.prompt.focus()
        self.refresh_bindings()
        if question.continues:
            await self.refresh_turns()
        else:
            await self.turns.extend(self.talk.path(), self.answer.id)
        self._asked_at = monotonic()
        self.engine.ask(question)

    async def answered(self, answer: Turn, reason: str) -> None:
        """Do what is to follow an answer that has ended."""

    @on(Loading)
    def model_loading(self, message: Loading) -> None:
        self.status.model = message.name
        if self.answer is None:
            self.status.show(loading_text(message))

    @on(Loaded)
    def model_loaded(self, message: Loaded) -> None:
        self.loaded(message)
        self.status.model, self.status.context = message.name, message.context
        self.status.memory_limit_bytes = message.memory_limit_bytes
        self.entry.attachments.count_with(getattr(self.engine, "count_tokens", lambda text: None))
        self.status.show("ready")
        self.welcome()

    @on(Reading)
    def prompt_read(self, message: Reading) -> None:
        if message.number == self.number and self.answer is not None:
            self.status.show(*reading_forms(message))

    @on(Piece)
    async def piece(self, message: Piece) -> None:
        """Keep and show new text and figures."""
        answer = self.answer
        if message.number != self.number or answer is None:
            return
        self.status.figures = message.figures
        text = self.grow(message)
        if message.revised is not None:
            await self.refresh_turns()
            text = ""
        if (view := self.answer_view(answer)) is not None:
            view.think(message.figures.thinking_tokens, message.figures.thinking_s)
            await view.write(text)

    @on(Ended)
    async def ended(self, message: Ended) -> None:
        if message.number == self.number and self.answer is not None:
            self.status.figures = message.figures or self.status.figures
            await self._end(message.reason, message)

    @on(Failed)
    async def failed(self, message: Failed) -> None:
        """Show the failure; no text is lost."""
        if message.number not in (None, self.number):
            return
        self.say(message.text, "error")
        if message.number is None:
            self.engine.stop()  # the model before answers nothing in its place
            self.not_loaded()
            self.welcome()
            self.status.show("no model; /model chooses one")
        if self.answer is not None:
            await self._end("failed")

    async def _end(self, reason: str, message: Ended | None = None) -> None:
        answer = self.answer
        view = self.answer_view(answer) if answer is not None else None
        if reason not in GOES_ON:
            self.entry.unqueue()
        if self.end_answer(reason, message.figures if message else None):
            if view is not None:
                await view.end()
        else:
            if reason == "failed" or self.status.figures is None:
                self.status.show("ready" if self.model.context else self.status.state)
            await self.refresh_turns()
        self.refresh_bindings()
        self.keeper.flush()
        if answer is not None:
            await self.answered(answer, reason)
        if self.answer is None:
            for waiting in self.entry.queued.take(*self.entry.queued.found[:1]):
                await self.asked(Entry.Asked(waiting.text, list(waiting.attachments)))
        if self.answer is None and monotonic() - self._asked_at >= self.config.notify_after_s:
            assert isinstance(self.app, Interrupts)
            self.app.call_back(f"{self.talk.chat.title or 'ring-mlx'}: the answer has ended", self.config.notify)
