"""A question, its answer as it comes, and how it ends; the layer above `ChatBase`."""

from __future__ import annotations

from textual import on

from tui.gauges import loading_text, reading_text
from tui.messages import Ended, Failed, Figures, Loaded, Loading, Piece, Question, Reading, Sampling
from tui.records import record_of
from tui.screens.base import ChatBase
from tui.store import Record, Turn
from tui.store.records import ASSISTANT, USER
from tui.widgets.entry import Entry


class Asking(ChatBase):
    """Asks the engine and keeps what it says."""

    _asked: Sampling | None = None
    _continued: Record | None = None
    _figures: Figures | None = None

    @on(Entry.Asked)
    async def asked(self, message: Entry.Asked) -> None:
        """Ask, unless an answer is running; the text waits in the prompt then."""
        if self.is_busy:
            self.entry.give_back(message.text, message.attachments)
            return
        self.talk.mark()
        question = self.talk.add(USER, message.text, message.attachments)
        self.keeper.keep(self.talk, question)
        await self.ask()

    async def ask(self, sampling: Sampling | None = None) -> None:
        """Answer the branch in view, which ends with a question; the caller has marked the way back.

        Args:
            sampling: Of this answer, by default the one in force.
        """
        await self._begin(self.talk.add(ASSISTANT, ""), sampling or self.sampling)

    async def go_on(self, answer: Turn) -> None:
        """Go on with an answer that ends the branch in view."""
        await self._begin(answer, self.sampling, continues=True)

    async def _begin(self, answer: Turn, sampling: Sampling, continues: bool = False) -> None:
        self.answer, self.number, self._asked = answer, self.number + 1, sampling
        self._continued, self._figures = answer.record if continues else None, None
        self.refresh_bindings()
        if continues:
            await self.refresh_turns()
        else:
            await self.turns.extend(self.talk.path(), answer.id)
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages = [*system, *self.talk.messages()]
        self.engine.ask(Question(self.number, messages, sampling, continues))

    @on(Loading)
    def model_loading(self, message: Loading) -> None:
        """Show how far the model has been loaded."""
        self.status.model = message.name
        if self.answer is None:
            self.status.show(loading_text(message))

    @on(Loaded)
    def model_loaded(self, message: Loaded) -> None:
        """Say which model it is."""
        self.model = message
        self.status.model, self.status.context = message.name, message.context
        self.status.memory_limit_bytes = message.memory_limit_bytes
        self.status.show("ready")

    @on(Reading)
    def reading(self, message: Reading) -> None:
        """Show how far the prompt has been read."""
        if message.number == self.number and self.answer is not None:
            self.status.show(reading_text(message))

    @on(Piece)
    async def piece(self, message: Piece) -> None:
        """Keep and show new text and figures."""
        if message.number != self.number or self.answer is None:
            return
        answer, self._figures = self.answer, message.figures
        if message.revised is not None:
            answer.thinking, answer.content = message.revised, ""
        self.status.figures = message.figures
        text = message.answer_text if answer.content else message.answer_text.lstrip("\n")
        answer.thinking += message.thinking_text
        answer.content += text
        self.keeper.keep_growing(self.talk, answer)
        if message.revised is not None:
            await self.refresh_turns()
            text = ""
        if (view := self.answer_view(answer)) is not None:
            view.think(message.figures.thinking_tokens, message.figures.thinking_s)
            await view.write(text)

    @on(Ended)
    async def ended(self, message: Ended) -> None:
        """Keep the answer, whole or not."""
        if message.number == self.number and self.answer is not None:
            self._figures = message.figures or self._figures
            if message.figures is not None:
                self.status.figures = message.figures
            await self._end(message.reason)

    @on(Failed)
    async def failed(self, message: Failed) -> None:
        """Say what went wrong; nothing that was written is lost."""
        if message.number in (None, self.number):
            self.trouble(message.text)
        if message.number is None:
            self.model = Loaded("", 0)
            self.status.show("no model; /model chooses one")
        if message.number in (None, self.number) and self.answer is not None:
            await self._end("failed")

    def stop_now(self) -> None:
        """End the running answer at once, as far as the chat is concerned; what was written stays."""
        self.engine.stop()
        answer, self.answer = self.answer, None
        if answer is not None:
            self._keep(answer, "stopped")

    async def _end(self, reason: str) -> None:
        answer, self.answer = self.answer, None
        assert answer is not None
        self.refresh_bindings()
        if self._keep(answer, reason):
            if (view := self.answer_view(answer)) is not None:
                await view.end()
        else:
            if reason == "failed" or self.status.figures is None:
                self.status.show("ready" if self.model.context else self.status.state)
            await self.refresh_turns()
        self.keeper.flush()

    def _keep(self, answer: Turn, reason: str) -> bool:
        """Keep an answer with its record; one without any text is taken back with its question."""
        if not answer.is_empty or reason in ("stop", "length"):
            sampling = self._asked or self.sampling
            answer.record = record_of(self.model, sampling, self._figures or Figures(), reason, self._continued)
            self.talk.chat.changed = max(self.talk.chat.changed, answer.created)
            self.talk.entitle()
            self.keeper.keep(self.talk, answer)
            return True
        question = self.talk.turns.get(answer.parent or "")
        self.talk.drop(answer)
        if question is not None and not self.talk.has_answers(question):
            self.talk.drop(question)
            self.keeper.forget(question)
            self.entry.give_back(question.content, question.attachments)
        self.talk.undo()
        self.keeper.keep(self.talk)
        return False
