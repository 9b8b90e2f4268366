"""One thread that owns the session: takes questions, posts messages; MLX runs on the session's own thread."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field, replace

from textual.message import Message

from ring_mlx import RingError
from tui import sources
from tui.messages import Ended, Failed, ModelChoice, Post, Question
from tui.sources import Load, Source, StoppedError


@dataclass
class _Asked:
    question: Question
    stopped: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Loads models and answers questions, one after the other, on a thread of its own.

    Args:
        choice: The first model.
        load: Makes a source of a choice and posts `Loading` and `Loaded`; by default `tui.sources.load`.
    """

    def __init__(self, choice: ModelChoice | None = None, load: Load | None = None) -> None:
        self._choice, self._load = choice or ModelChoice(), load or sources.load
        self._post: Post = lambda message: None
        self._work: queue.Queue[_Asked | ModelChoice | None] = queue.Queue()
        self._latest: _Asked | None = None
        self._source: Source | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, post: Post) -> None:
        """Start the thread, which loads the model first; ``post`` must take messages from any thread."""
        self._post = post
        self._thread.start()

    def ask(self, question: Question) -> None:
        """Answer a question; may be called before the model is loaded."""
        self._latest = _Asked(question)
        self._work.put(self._latest)

    def switch(self, choice: ModelChoice) -> None:
        """End the answer and load another model; the old one is freed first, and comes back if the new one fails.

        What the choice leaves open of memory for experts, steps and the rules for thoughts stays as it is.
        """
        self.stop()
        names = ("expert_cache_bytes", "thinking", "prefill_step_tokens")
        kept = {name: getattr(self._choice, name) for name in names if getattr(choice, name) is None}
        self._work.put(replace(choice, **kept))

    def stop(self) -> None:
        """End the latest question's answer after the token or prompt step at hand."""
        if self._latest is not None:
            self._latest.stopped.set()
        if (source := self._source) is not None:
            source.stop()

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the answer and free the model; returns whether the thread has ended, so that the process may exit."""
        self.stop()
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._use(self._choice)
            while (work := self._work.get()) is not None:
                if isinstance(work, ModelChoice):
                    self._replace(work)
                else:
                    self._answer(work)
            self._free()
        except Exception as e:  # noqa: BLE001 whatever happens here is shown, not raised across the screen
            self._post(Failed(in_one_line(e)))

    def _use(self, choice: ModelChoice) -> bool:
        try:
            self._source, self._choice = self._load(choice, self._post), choice
        except Exception as e:  # noqa: BLE001 as above; another choice may fare better
            self._post(Failed(in_one_line(e)))
        return self._source is not None

    def _replace(self, choice: ModelChoice) -> None:
        had_one = self._source is not None
        self._free()
        if not self._use(choice) and had_one:
            self._use(self._choice)

    def _free(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _answer(self, asked: _Asked) -> None:
        number, last = asked.question.number, Ended(asked.question.number, "stopped")
        said: Message = last
        try:
            if self._source is None:
                said = Failed("[model] no model is loaded; choose one with /model.", number)
            elif not asked.stopped.is_set():
                said = self._source.answer(asked.question, asked.stopped, self._post)
        except StoppedError:
            said = last
        except Exception as e:  # noqa: BLE001 as above; the next question may fare better
            said = Failed(in_one_line(e), number)
        self._post(said)


def in_one_line(e: Exception) -> str:
    """What to show of an exception."""
    if isinstance(e, RingError):
        return str(e)
    return f"[engine] {type(e).__name__}: {' '.join(str(e).split())[:200]}; please report this."
