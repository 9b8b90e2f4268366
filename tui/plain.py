"""``ring-mlx chat --plain``: a line in, an answer out, for dumb terminals and pipes.

Questions come from standard input, a line each; a line that ends in a backslash goes on in the next. Answers go to
standard output and everything else to standard error, so that a pipe gets answers only. Ctrl+C ends the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import sys
from collections.abc import Callable, Iterable
from time import monotonic

from textual.message import Message

from ring_mlx import RingError, for_output, harmless, whole_text
from tui import commands, files, paths
from tui.config import Config
from tui.conversation import Conversation
from tui.editor import edited, run_here
from tui.front_end import Done, FrontEnd
from tui.gauges import counted, gauges, reading_text
from tui.keeper import WRITE_EVERY_S, Keeper
from tui.messages import Answering, Ended, Entitled, Failed, Loaded, ModelChoice, Piece, Question, Reading
from tui.models import TOY_NAME
from tui.records import GO_ON, end_words, record_lines
from tui.signals import AGAIN_S
from tui.store import Attachment, Turn, chats, search
from tui.store.access import make_private
from tui.store.records import ASSISTANT, USER

WIDTH, LISTED = 100, 20
AROUND = 40  # characters beside what is found
FAILED, CUT_OFF = 2, 4  # exit codes; the first comes before the second


class Plain(FrontEnd):
    """One conversation, line by line; ``notes`` are lines to show at the start."""

    def __init__(
        self, engine: Answering, keeper: Keeper, config: Config, talk: Conversation | None, notes: Iterable[str]
    ) -> None:
        super().__init__(engine, keeper, config, talk)
        self._notes, self._is_over, self._codes = list(notes), False, {0}
        self._attachments: list[Attachment] = []
        self._listed: list[str] = []
        self._interrupted_at = float("-inf")
        self._heard: queue.Queue[Message] = queue.Queue()
        self._is_terminal = sys.stdin.isatty()
        keeper.tell_with(self.say)

    def run(self) -> int:
        """Read and answer until the input ends; returns the exit code: 2 if a question failed, 4 if an answer was cut off."""
        for note in self._notes:
            self.say(note)
        history = self._start_history()
        self.engine.start(self._heard.put)
        try:
            return self._run()
        finally:
            if self.answer is not None:  # a signal has ended it
                self.engine.stop()
                self.end_answer("stopped")
            if history is not None:
                self._keep_history(history)

    def _run(self) -> int:
        has_other = getattr(self.engine, "fallback", None) is not None
        if not self._wait_for_model() and not (has_other and self._wait_for_model()):
            return FAILED
        self.open_chat(self.talk)
        while not self._is_over and (line := self._read()) is not None:
            if commands.is_command(line):
                self.command(line)
            else:
                self.put(line)
        while not self._heard.empty():
            if isinstance(message := self._heard.get(), Entitled):
                self.entitled(message)
        return FAILED if FAILED in self._codes else max(self._codes)

    def wish_title(self) -> None:
        """Have a title made where somebody types; a pipe's end does not wait for it."""
        if self._is_terminal:
            super().wish_title()

    def say(self, text: str, severity: str = "information") -> None:
        """Show one line beside the answers, whatever the names in it hold."""
        print(harmless(text, is_name=True), file=sys.stderr, flush=True)

    def command(self, line: str) -> None:
        found = commands.split(line)
        if found is None or not found[0].plain:
            self.say(f"There is no command {line.split()[0]} in plain mode; /help lists them.")
            return
        try:
            self.method_of(found[0])(found[1])
        except RingError as e:
            self.say(str(e))

    def send(self, question: Question) -> None:
        """Ask, and print the answer as it comes."""
        answer = self.answer
        assert answer is not None
        self.engine.ask(question)
        while True:
            try:
                message = self._heard.get(timeout=WRITE_EVERY_S)
            except queue.Empty:
                self.keeper.flush()
                continue
            except KeyboardInterrupt:
                self.engine.stop()
                continue
            if isinstance(message, Piece) and message.number == self.number:
                if message.revised is not None and answer.content:
                    print(flush=True)
                    self.say("The text above was the thought; the answer follows.")
                print(for_output(self.grow(message)), end="", flush=True)
            elif isinstance(message, Reading) and self._is_terminal and message.done < message.total:
                self.say(reading_text(message))
            elif isinstance(message, Entitled):
                self.entitled(message)
            elif isinstance(message, (Ended, Failed)) and message.number in (None, self.number):
                self._codes.add(self._finish(message, answer))
                return

    def _finish(self, message: Ended | Failed, answer: Turn) -> int:
        if answer.content:
            print(flush=True)
        if isinstance(message, Failed):
            self.end_answer("failed")
            self.say(message.text)
            return FAILED
        self.end_answer(message.reason, message.figures)
        if said := end_words(answer):
            self.say(f"[chat] {said}")
        if self._is_terminal:
            shown = gauges(self.figures, self.model.context, self.model.memory_limit_bytes, WIDTH)
            self.say(f"[{message.reason}, {shown}]")
        return CUT_OFF if answer.record and answer.record.finish_reason in GO_ON else 0

    def _wait_for_model(self) -> bool:
        while True:
            message = self._heard.get()
            if isinstance(message, Loaded):
                self.loaded(message)
                if self._is_terminal:
                    self.say(f"{message.name}, {message.context:,} tokens of context; /help lists commands.")
                return True
            if isinstance(message, Failed):
                self.say(message.text)
                self.not_loaded()
                return False

    def use_model(self, choice: ModelChoice) -> None:
        had_one = bool(self.model.name)
        self.switch_model(choice, for_new=False)
        if not self._wait_for_model() and had_one:  # the engine loads the old one again
            self._wait_for_model()

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """The commands that choose a model for the chat."""
        own, coming = self.own.model, self.coming
        names = [choice.path or TOY_NAME for choice in (own, coming) if choice]
        return f"/model {names[0]} loads its own, /model {names[-1]} goes on with the other"

    def offer_model(self, action: Callable[[], Done]) -> None:
        """Ask nothing before the user has chosen."""
        self.decline()
        self.tell_settings()
        self._codes.add(FAILED)

    def open_chat(self, talk: Conversation) -> None:
        self.talk = talk
        self.tell_settings()
        if self.differences:
            self.say(f"[chat] This chat has {', '.join(self.differences)}.")
        if (last := talk.leaf) is not None and last.record is None and (said := end_words(last)):
            self.say(f"[chat] {said}")

    def do_chats(self, words: str) -> None:
        if words.isdecimal() and 1 <= int(words[:9]) <= len(self._listed):
            talk = self.keeper.open(self._listed[int(words[:9]) - 1]) or self.talk
            self.say(f"Opened {talk.chat.title!r}, {counted(len(talk.path()), 'turn')}.")
            self.open_chat(talk)
            return
        db = self.keeper.db
        if words:
            hits = search.find(db, words, LISTED)
            marks = str.maketrans({search.OPEN: "[", search.CLOSE: "]"})
            said = {h.chat for h in hits}
            named = [c for c in chats.listed(db) if c.id not in said and chats.is_called(c.title, words)]
            rows = [(c.id, c.title) for c in named[:LISTED]]
            rows += [(h.chat, f"{h.title}: {h.snippet.translate(marks)}") for h in hits]
        else:
            rows = [(c.id, c.title or "untitled") for c in chats.listed(db, LISTED)]
        self._listed = [chat_id for chat_id, _ in rows]
        for n, (_, line) in enumerate(rows, 1):
            self.say(f"{n:3} {line}")
        self.say("/chats N opens one." if rows else "There are none.")

    def do_model(self, name: str) -> None:
        if name:
            super().do_model(name)
        else:
            self.say(f"The model is {self.model.name}; /model NAME loads another one.")

    def do_repeat(self, _: str) -> None:
        turn = self.chosen(ASSISTANT)
        self.repeat(turn, turn.record if turn else None)

    def do_undo(self, _: str) -> None:
        self.say(f"{counted(len(self.talk.path()), 'turn')} now." if self.talk.undo() else "There is nothing to undo.")
        self.keeper.keep(self.talk)

    def do_record(self, _: str) -> None:
        turn = self.chosen_answer()
        for line in record_lines(turn.record) if turn and turn.record else ():
            self.say(line)

    def do_find(self, words: str) -> None:
        wanted = re.compile(r"\s+".join(map(re.escape, words.split())), re.IGNORECASE)
        found = [(n, t, m) for n, t in enumerate(self.talk.path(), 1) if words and (m := wanted.search(t.content))]
        for n, turn, hit in found:
            around = turn.content[max(0, hit.start() - AROUND) : hit.end() + AROUND]
            self.say(f"{n:3} {turn.role}: …{' '.join(around.split())}…")
        if not found:
            self.say("Nothing is found." if words else "/find TEXT searches in this chat.")

    def do_editor(self, _: str) -> None:
        """Write a question in the editor and ask it."""
        with contextlib.suppress(KeyboardInterrupt):
            self.put(asyncio.run(edited("", run_here)).strip())

    def put(self, question: str) -> None:
        """Ask a question with what is attached."""
        if question or self._attachments:
            if reason := self.refusal(self.messages_with(question, self._attachments)):
                self.say(reason)
                self._codes.add(FAILED)
                self._attachments = []
                return
            attachments, self._attachments = self._attachments, []
            self.talk.mark()
            self.keeper.keep(self.talk, self.talk.add(USER, question, attachments))
            self.ask()

    def do_attach(self, path: str) -> None:
        self._attachments.append(files.read_attachment(path))

    def do_help(self, _: str) -> None:
        for name, _keys, text in commands.help_rows({}, plain=True):
            self.say(f"{name:32} {text}")

    def do_quit(self, _: str) -> None:
        self._is_over = True

    def _read(self) -> str | None:
        lines: list[str] = []
        while True:
            try:
                prompt = "… " if lines else "> "
                line = whole_text(input(prompt if self._is_terminal else ""))
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                before, self._interrupted_at = self._interrupted_at, monotonic()
                if self._interrupted_at - before < AGAIN_S:
                    return None
                self.say("")
                self.say("Once more quits.")
                return ""
            except UnicodeDecodeError as e:
                self.say(f"[option] standard input is not UTF-8 text ({e}); pipe a text file.")
                return None
            if not line.endswith("\\"):
                return "\n".join([*lines, line]).strip()
            lines.append(line[:-1])

    def _start_history(self) -> object:
        """Readline with the history of earlier times, where there is such a thing and somebody types."""
        if not self._is_terminal:
            return None
        try:
            import readline
        except ImportError:
            return None
        with contextlib.suppress(OSError):
            make_private(paths.data_file("history"))
            readline.read_history_file(paths.data_file("history"))
        return readline

    def _keep_history(self, readline: object) -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(paths.data_file("history"))  # type: ignore[attr-defined]
