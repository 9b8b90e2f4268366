"""``ring-mlx chat --plain``: a line in, an answer out, for dumb terminals and pipes.

Questions come from standard input, a line each; a line that ends in a backslash goes on in the next. Answers go to
standard output and everything else to standard error, so that a pipe gets answers only. Ctrl+C ends the answer.
"""

from __future__ import annotations

import contextlib
import queue
import sys
from collections.abc import Iterable

from textual.message import Message

from ring_mlx import for_output, harmless, whole_text
from tui import commands, paths
from tui.config import Config
from tui.conversation import Conversation
from tui.gauges import gauges, reading_text
from tui.keeper import WRITE_EVERY_S, Keeper
from tui.messages import Answering, Ended, Failed, Loaded, Piece, Question, Reading, Sampling
from tui.plain_commands import PlainCommands
from tui.records import GO_ON, end_words, record_of
from tui.store import Record, Turn
from tui.store.access import make_private

WIDTH = 100
FAILED, CUT_OFF = 2, 4  # exit codes; the first comes before the second


class Plain(PlainCommands):
    """One conversation, line by line.

    Args:
        engine: Not started yet; whoever made it closes it.
        keeper: Keeps what is said.
        config: Settings at the start.
        talk: The chat to begin with, by default a new one.
        notes: Lines to show at the start.
    """

    def __init__(
        self, engine: Answering, keeper: Keeper, config: Config, talk: Conversation | None, notes: Iterable[str]
    ) -> None:
        super().__init__(keeper, config, talk or Conversation())
        self.engine, self._notes = engine, list(notes)
        self.before: Record | None = None
        self._heard: queue.Queue[Message] = queue.Queue()
        self._is_terminal = sys.stdin.isatty()
        keeper.tell_with(self.tell)

    def run(self) -> int:
        """Read and answer until the input ends; returns the exit code: 2 if a question failed, 4 if an answer was cut off."""
        for note in self._notes:
            self.tell(note)
        history = self._start_history()
        self.engine.start(self._heard.put)
        if not self._wait_for_model():
            return FAILED
        codes = {0}
        while not self.is_over and (line := self._read()) is not None:
            if commands.is_command(line):
                self.command(line)
            elif line or self.attachments:
                codes.add(self.asked(line))
            if self.wants_answer:
                codes.add(self._answer())
        if history is not None:
            self._keep_history(history)
        return FAILED if FAILED in codes else max(codes)

    def asked(self, text: str) -> int:
        """Ask a question."""
        self.talk.mark()
        self.keeper.keep(self.talk, self.talk.add("user", text, self.take_attachments()))
        return self._answer()

    def tell(self, text: str) -> None:
        """Show one line beside the answers, whatever the names in it hold."""
        print(harmless(text, is_name=True), file=sys.stderr, flush=True)

    def _answer(self) -> int:
        continues, self.wants_answer, self.continues = self.continues, False, False
        answer = self.talk.leaf if continues else self.talk.add("assistant", "")
        assert answer is not None
        self.before = answer.record if continues else None
        sampling, self.repeated = self.repeated or self.config.sampling, None
        self.number += 1
        system = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        messages = [*system, *self.talk.messages()]
        self.engine.ask(Question(self.number, messages, sampling, continues))
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
                if message.revised is not None:
                    self._revise(answer, message.revised)
                text = message.answer_text if answer.content else message.answer_text.lstrip("\n")
                answer.thinking += message.thinking_text
                answer.content += text
                self.figures = message.figures
                print(for_output(text), end="", flush=True)
                self.keeper.keep_growing(self.talk, answer)
            elif isinstance(message, Reading) and self._is_terminal and message.done < message.total:
                self.tell(reading_text(message))
            elif isinstance(message, (Ended, Failed)) and message.number in (None, self.number):
                return self._finish(message, answer.id, sampling)

    def _revise(self, answer: Turn, thought: str) -> None:
        if answer.content:
            print(flush=True)
            self.tell("The text above was the thought; the answer follows.")
        answer.thinking, answer.content = thought, ""

    def _finish(self, message: Ended | Failed, answer_id: str, sampling: Sampling) -> int:
        answer = self.talk.turns[answer_id]
        if answer.content:
            print(flush=True)
        reason = message.reason if isinstance(message, Ended) else "failed"
        self.figures = (message.figures if isinstance(message, Ended) else None) or self.figures
        if not answer.is_empty or reason in ("stop", "length"):
            answer.record = record_of(self.model, sampling, self.figures, reason, self.before)
            self.talk.entitle()
            self.keeper.keep(self.talk, answer)
        else:
            self.talk.drop(answer)
            self.keeper.keep(self.talk)
        if isinstance(message, Failed):
            self.tell(message.text)
            return FAILED
        if said := end_words(answer):
            self.tell(f"[chat] {said}")
        if self._is_terminal:
            self.tell(f"[{reason}, {gauges(self.figures, self.model.context, self.model.memory_limit_bytes, WIDTH)}]")
        return CUT_OFF if answer.record and answer.record.finish_reason in GO_ON else 0

    def _wait_for_model(self) -> bool:
        while True:
            message = self._heard.get()
            if isinstance(message, Loaded):
                self.model = message
                if self._is_terminal:
                    self.tell(f"{message.name}, {message.context:,} tokens of context; /help lists commands.")
                return True
            if isinstance(message, Failed):
                self.tell(message.text)
                return False

    def use_model(self, name: str) -> None:
        """Load another model and wait for it."""
        self.engine.switch(self.choice_of(name))
        self._wait_for_model()

    def _read(self) -> str | None:
        lines: list[str] = []
        while True:
            try:
                prompt = "… " if lines else "> "
                line = whole_text(input(prompt if self._is_terminal else ""))
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                self.tell("")
                return ""
            except UnicodeDecodeError as e:
                self.tell(f"[option] standard input is not UTF-8 text ({e}); pipe a text file.")
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
