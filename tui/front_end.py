"""The common part of the screens and plain mode: one chat, its settings, and answers from question to store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from tui.chat_model import ChatModel
from tui.commands import Command
from tui.config import Config
from tui.conversation import Conversation, said
from tui.keeper import Keeper
from tui.messages import Answering, Figures, Loaded, Messages, Piece, Question, Sampling
from tui.records import record_of, sampling_of
from tui.store import Attachment, Record, StoreError, Turn
from tui.store.records import ASSISTANT, USER
from tui.titles import Titles
from tui.transfer import export_talk, import_talk

NEVER_TOO_LONG = 8192  # tokens, which every model has room for that was loaded
Done = Awaitable[None] | None  # a command has been carried out, or will be once this has been awaited


class FrontEnd(ChatModel, Titles):
    """One chat, one engine, and the commands that need no screen: the method ``do_new`` carries out ``/new``.

    Args:
        engine: Not started yet; the caller closes it.
        keeper: Keeps what is said.
        config: Settings at the start.
        talk: The chat to begin with, by default a new one.
    """

    def __init__(self, engine: Answering, keeper: Keeper, config: Config, talk: Conversation | None = None) -> None:
        self.engine, self.keeper, self.config, self.talk = engine, keeper, config, talk or Conversation()
        self.model, self._pending, self._untitled = Loaded("", 0), [], {}
        self.number = 0  # of the latest question
        self.answer: Turn | None = None  # while it is being written
        self._sampling, self._system_prompt, self.figures = config.sampling, config.system_prompt, Figures()
        self._continued: Record | None = None
        self._held = ""  # a carriage return at the end of what is shown, which may begin a line end of Windows

    def method_of(self, command: Command) -> Callable[[str], Done]:
        """The method that carries a command out."""
        method: Callable[[str], Done] = getattr(self, f"do_{command.name}")
        return method

    def say(self, text: str, severity: str = "information") -> None:
        """Show one line: an "information", a "warning" or an "error"."""
        raise NotImplementedError

    def open_chat(self, talk: Conversation) -> Done:
        raise NotImplementedError

    def send(self, question: Question) -> Done:
        """Show that an answer is being written, and ask the engine for it."""
        raise NotImplementedError

    def chosen(self, role: str | None = None) -> Turn | None:
        """The turn of a command: the last one, or the last one of a role."""
        return next((t for t in reversed(self.talk.path()) if role in (None, t.role)), None)

    def chosen_answer(self) -> Turn | None:
        """The answer of a command; says so if there is none."""
        found = self.chosen(ASSISTANT)
        if found is None:
            self.say("There is no answer yet.")
        return found

    @property
    def is_busy(self) -> bool:
        """Whether an answer is running; says so if it is."""
        if self.answer is not None:
            self.say("An answer is running; Esc stops it.")
        return self.answer is not None

    def ask(self, sampling: Sampling | None = None, by_any: bool = False) -> Done:
        """Answer the branch in view, which ends with a question; the caller has marked the way back.

        If another model than the chat's would answer, the user decides, unless it may be ``by_any``.
        """
        self.catch_up()
        self.settle()
        if self.is_other_model and not by_any:
            return self.offer_model(lambda: self.ask(sampling))
        self.keep_model()
        return self._begin(self.talk.add(ASSISTANT, ""), sampling or self.sampling)

    def offer_model(self, action: Callable[[], Done]) -> Done:
        """Let the user load the chat's model or go on with the other, then do this, or take the question back."""
        raise NotImplementedError

    def decline(self) -> None:
        """Take a question that is not asked back."""
        leaf = self.talk.leaf
        self.return_question(leaf if leaf is not None and leaf.role == USER else None)
        self.keeper.keep(self.talk)

    def return_question(self, question: Turn | None) -> Turn | None:
        """Forget a question, unless it has answers, and go back to before it; returns it if it is forgotten."""
        if question is not None and self.talk.has_answers(question):
            question = None
        if question is not None:
            self.talk.drop(question)
            self.keeper.forget(question)
        self.talk.undo()
        return question

    def _begin(self, answer: Turn, sampling: Sampling, continues: bool = False) -> Done:
        self.answer, self.number = answer, self.number + 1
        self._sampling, self._system_prompt = sampling, self.system_prompt
        self._continued, self.figures, self._held = answer.record if continues else None, Figures(), ""
        if self.keeper.is_deleted(self.talk):
            self.keeper.bring_back(self.talk)
            self.say("This chat had been deleted; your question has brought it back.")
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        return self.send(Question(self.number, [*system, *self.talk.messages()], sampling, continues))

    def messages_with(self, text: str, attachments: Iterable[Attachment]) -> Messages:
        """The branch in view with a question, where that is so long that it may be refused; else none."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        question = said(Turn(USER, text, attachments=tuple(attachments)))
        found = [*system, *self.talk.messages(), {"role": USER, "content": question}]
        size = sum(len(m["content"].encode("utf-8", "replace")) for m in found)
        return found if size > min(self.model.context, NEVER_TOO_LONG) // 2 else []

    def refusal(self, messages: Messages) -> str:
        """Why messages take too much context or memory, or nothing; takes its time."""
        refusal = getattr(self.engine, "refusal", None)  # engines of scripts have none
        return str(refusal(messages)) if messages and refusal is not None else ""

    def grow(self, piece: Piece) -> str:
        """Add a piece to the running answer and keep it; returns what is to be shown of its text now."""
        answer, self.figures = self.answer, piece.figures
        assert answer is not None
        if piece.revised is not None:
            answer.thinking, answer.content = piece.revised, ""
        text = piece.answer_text if answer.content else piece.answer_text.lstrip("\n")
        answer.thinking += piece.thinking_text
        answer.content += text
        self.keeper.keep_growing(self.talk, answer)
        shown = text if piece.revised is not None else self._held + text
        self._held = "\r" if shown.endswith("\r") else ""
        return shown.removesuffix("\r")

    def end_answer(self, reason: str, figures: Figures | None = None) -> bool:
        """Keep the running answer with its record; returns False if it has no text and was removed."""
        answer, self.answer, self.figures = self.answer, None, figures or self.figures
        assert answer is not None
        if answer.is_empty and reason not in ("stop", "length"):
            self.take_back(answer)
            self.keeper.keep(self.talk)
            return False
        record = record_of(self.model, self._sampling, self.figures, reason, self._continued)
        answer.record = replace(record, system_prompt=self._system_prompt)
        self.talk.chat.changed = max(self.talk.chat.changed, answer.created)
        self.begin_title()
        self.keeper.keep(self.talk, answer)
        self.wish_title()
        if self.keeper.is_deleted(self.talk):
            self.say(
                "This chat has been deleted, perhaps in another window; your next question brings it back.", "warning"
            )
        return True

    def take_back(self, answer: Turn) -> None:
        self.talk.drop(answer)
        self.keeper.forget(answer)  # a piece without visible text may have been written

    def catch_up(self) -> list[Turn]:
        """Take in what other windows have written in the chat, and return turns that are new."""
        try:
            return self.keeper.catch_up(self.talk, self.answer)
        except StoreError as e:
            self.say(str(e), "warning")
            return []

    def do_new(self, _: str) -> Done:
        return self.open_chat(Conversation())

    def do_regenerate(self, _: str) -> Done:
        return None if self.is_busy else self.answer_again(self.chosen())

    def do_repeat(self, _: str) -> Done:
        turn = None if self.is_busy else self.chosen_answer()
        return None if turn is None else self.repeat(turn, turn.record)

    def repeat(self, turn: Turn | None, record: Record | None) -> Done:
        """Answer again with the seed and sampling of a record."""
        sampling = sampling_of(record)
        if sampling is None:
            self.say("The answer's record names no seed; /regenerate answers with another one.")
            return None
        if record is not None and record.model != self.model.name:
            self.say(f"That answer was {record.model}'s; {self.model.name} will say something else.", "warning")
        return self.answer_again(turn, sampling, by_any=True)

    def answer_again(self, turn: Turn | None, sampling: Sampling | None = None, by_any: bool = False) -> Done:
        """Answer a question, or that of an answer, beside its present answer."""
        if turn is not None and turn.role == ASSISTANT:
            turn = self.talk.turns.get(turn.parent or "")
        if turn is None:
            self.say("There is no question yet.")
            return None
        self.talk.cut_after(turn)
        return self.ask(sampling, by_any)

    def do_continue(self, _: str) -> Done:
        if self.is_busy:
            return None
        self.catch_up()
        turn = self.chosen_answer()
        if turn is None:
            return None
        if not turn.content.strip():
            self.say("The answer has no text to go on from; /regenerate asks again.")
            return None
        if turn.calls:
            self.say("The answer ended with a tool call; there is nothing to go on from.")
            return None
        return self.go_on(turn)

    def go_on(self, turn: Turn) -> Done:
        self.settle()
        if self.is_other_model:
            self.talk.mark()

            def go_on() -> Done:
                self.talk.undo()
                return self.go_on(turn)

            return self.offer_model(go_on)
        self.keep_model()
        if turn is not self.talk.leaf:
            self.talk.cut_after(turn)
        if self.keeper.db.is_shared:  # another window may go on with it too
            self.talk.mark()
            turn = self.talk.again(turn)
        else:
            self.talk.mark(turn)
        return self._begin(turn, self.sampling, continues=True)

    def do_title(self, title: str) -> None:
        if title and self.talk.turns:
            self._untitled.pop(self.talk.chat.id, None)
            self.keeper.rename(self.talk, title)
            self.say(f"Renamed to {title}.")
        else:
            self.say(f"The title is {self.talk.chat.title!r}." if self.talk.turns else "There is no chat yet.")

    def do_export(self, argument: str) -> None:
        self.say(export_talk(self.talk, argument))

    def do_import(self, path: str) -> Done:
        talk = import_talk(path)
        self.keeper.keep(talk, *talk.turns.values())
        return self.open_chat(talk)
