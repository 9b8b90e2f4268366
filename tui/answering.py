"""From screens to a `ring_mlx.Session`: a thread sends it questions and posts its events as messages.

Importing this module is cheap: MLX is imported on the session's own thread.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from textual.message import Message

from ring_mlx import (
    AnswerText,
    End,
    PrefillProgress,
    RingError,
    Sampling,
    Session,
    Thinking,
)
from tui import paths
from tui.messages import Ended, Entitled, Failed, Loaded, Loading, Messages, ModelChoice, Post, Question, Reading
from tui.messages import Sampling as Chosen
from tui.title_text import ASKED_FOR_A_TITLE, messages
from tui.updates import Updates

TOY = "toy"
SHORTEN = "shorten the question, begin a new chat (/new), or go back to an earlier turn (/branch)."


class StoppedError(Exception):
    """The user stopped the answer while its prompt was being read."""


class Engine:
    """Loads models and answers questions, one after the other, on a thread of its own.

    Args:
        choice: The first model.
        load: Makes a `SessionSource`, or what answers, stops and closes as one does.
    """

    def __init__(
        self, choice: ModelChoice | None = None, load: Callable[[ModelChoice, Post], SessionSource] | None = None
    ) -> None:
        self.choice, self._load = choice or ModelChoice(), load or SessionSource
        self.fallback: ModelChoice | None = None  # loaded at the start if the first cannot be
        self._post: Post = lambda message: None
        self._work: queue.Queue[tuple[Question, threading.Event] | ModelChoice | None] = queue.Queue()
        self._stopped = threading.Event()
        self._source: SessionSource | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, post: Post) -> None:
        """Start the thread, which loads the model first; ``post`` must take messages from any thread."""
        self._post = post
        self._thread.start()

    def ask(self, question: Question) -> None:
        """Answer a question; may be called before the model is loaded."""
        self._stopped = threading.Event()
        self._work.put((question, self._stopped))

    def switch(self, choice: ModelChoice) -> None:
        """End the answer and load another model; the old one is freed first, and comes back if the new one fails.

        Memory for experts, steps and the rules for thoughts stay as they are unless the choice gives them.
        """
        self.stop()
        names = ("expert_cache_bytes", "thinking", "prefill_step_tokens", "speculate")
        kept = {name: getattr(self.choice, name) for name in names if getattr(choice, name) is None}
        self._work.put(replace(choice, **kept))

    def entitle(self, chat_id: str, question: str, answer: str) -> None:
        """Have a title made while nothing else is wanted; `Entitled` brings it, if there is one."""
        entitle = getattr(self._source, "entitle", None)
        if entitle is not None:
            threading.Thread(target=entitle, args=(chat_id, question, answer, self._post), daemon=True).start()

    def stop(self) -> None:
        """End the latest question's answer after the present token or prompt step."""
        self._stopped.set()
        if (source := self._source) is not None:
            source.stop()

    def count_tokens(self, text: str) -> int | None:
        """The tokens of a text, or None while no model is loaded; takes its time, on the caller's thread."""
        try:
            return source.count_tokens(text) if (source := self._source) is not None else None
        except Exception:  # noqa: BLE001 it is being closed, or the text is strange; an answer will say so
            return None

    def refusal(self, messages: Messages) -> str:
        """Why these cannot be answered for want of context or memory, or nothing; takes its time as above."""
        try:
            if (source := self._source) is not None:
                source.check(messages)
        except RingError as e:
            return not_answered(e)
        except Exception:  # noqa: BLE001 as above
            return ""
        return ""

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the answer and free the model; returns whether the thread has ended, so that the process may exit."""
        self.stop()
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if not self._use(self.choice) and self.fallback is not None:
            self._use(self.fallback)
        while (work := self._work.get()) is not None:
            if isinstance(work, ModelChoice):
                had_one = self._source is not None
                self._free()
                if not self._use(work) and had_one:
                    self._use(self.choice)
            else:
                self._answer(*work)
        self._free()

    def _use(self, choice: ModelChoice) -> bool:
        try:
            self._source, self.choice = self._load(choice, self._post), choice
        except Exception as e:  # noqa: BLE001 what happens is shown, not raised; another choice may fare better
            self._post(Failed(in_one_line(e)))
        gc.collect()  # what loading has left, which would stay too
        gc.freeze()  # walking through all that stays would hold back a key for 0.1 s, twice a second
        return self._source is not None

    def _free(self) -> None:
        source, self._source = self._source, None
        gc.unfreeze()  # for the model to be found
        try:
            if source is not None:
                source.close()
        except Exception as e:  # noqa: BLE001 as above
            self._post(Failed(in_one_line(e)))

    def _answer(self, question: Question, stopped: threading.Event) -> None:
        last: Message = Ended(question.number, "stopped")
        try:
            if self._source is None:
                last = Failed("[model] no model is loaded; choose one with /model.", question.number)
            elif not stopped.is_set():
                last = self._source.answer(question, stopped, self._post)
        except StoppedError:
            pass
        except Exception as e:  # noqa: BLE001 as above; the next question may fare better
            last = Failed(not_answered(e), question.number)
        self._post(last)


def in_one_line(e: Exception) -> str:
    """An exception in one line, for the user."""
    if isinstance(e, RingError):
        return str(e)
    name = f" of {e.filename}" if isinstance(e, OSError) and e.filename else ""
    return f"[engine] {type(e).__name__}{name}: {' '.join(paths.in_words(e).split())[:200]}; please report this."


def not_answered(e: Exception) -> str:
    """Why a question cannot be answered; of one that is too long with a remedy that a chat has."""
    said = in_one_line(e)
    if isinstance(e, RingError) and e.origin in ("prompt", "memory") and "tokens" in said:
        problem, _, remedy = said.rpartition("; ")
        return f"{problem}; {SHORTEN}" if e.origin == "prompt" else f"{problem}; {remedy.rstrip('.')}: {SHORTEN}"
    return said


class SessionSource:
    """A session, used on the engine's thread; only `stop` may be called from any.

    Args:
        choice: The model.
        post: Takes `Loading` and `Loaded`.

    Raises:
        RingError: If the model cannot be had or does not fit.
    """

    def __init__(self, choice: ModelChoice, post: Post) -> None:
        name = Path(choice.path).name if choice.path else TOY
        post(Loading(name))
        thinking = choice.thinking or Thinking()
        self._session = Session(
            choice.path,
            revision=choice.revision,
            decay_layer_offset=choice.decay_layer_offset,
            adapter_path=choice.adapter_path,
            expert_cache_bytes=choice.expert_cache_bytes,
            store=paths.snapshots(),
            prefill_step_tokens=choice.prefill_step_tokens,
            speculate=choice.speculate or "auto",
            draft_model=choice.draft_model,
            thinking_start=thinking.start,
            answer_room=thinking.answer_room,
            on_loading=lambda event: post(Loading(name, event.done, event.total)),
        )
        try:
            info = self._session.wait_until_loaded()
        except BaseException:
            self._session.close(0)
            raise
        quantization = "" if info.quantization == "none" else info.quantization
        s = info.sampling
        plain = Chosen(temp=s.temp, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p)
        post(Loaded(name, info.context_tokens, quantization, info.memory_limit_bytes, plain, choice))

    def stop(self) -> None:
        """End the running answer; from any thread."""
        self._session.stop()

    def count_tokens(self, text: str) -> int:
        """The tokens of a text; from any thread."""
        return self._session.count_tokens(text)

    def check(self, messages: Messages) -> None:
        """Raises RingError if messages cannot be answered; from any thread."""
        self._session.check(list(messages))

    def close(self) -> None:
        """Save what was read and free the model."""
        self._session.close()

    def entitle(self, chat_id: str, question: str, answer: str, post: Post) -> None:
        """Post what the model calls an exchange, unless something else is wanted meanwhile."""
        with contextlib.suppress(RingError):
            events = list(self._session.send(messages(question, answer), **ASKED_FOR_A_TITLE))
            if isinstance(end := events[-1], End) and end.reason == "stop":
                post(Entitled(chat_id, "".join(e.text for e in events if isinstance(e, AnswerText))))

    def answer(self, question: Question, stopped: threading.Event, post: Post) -> Ended:
        """Post the answer's messages and return the last.

        Raises:
            StoppedError: If the prompt was not read to its end.
            RingError: If the question cannot be answered.
        """
        s = question.sampling
        xtc = {n: getattr(s, n) for n in ("xtc_probability", "xtc_threshold") if getattr(s, n) is not None}
        reply = self._session.send(
            list(question.messages),
            sampling=Sampling(temp=s.temp, top_p=s.top_p, min_p=s.min_p, top_k=s.top_k, seed=s.seed, **xtc),
            max_tokens=s.max_tokens,
            thinking_budget=s.thinking_budget,
            continue_last=question.continues,
        )
        if stopped.is_set():
            reply.stop()
        updates, end = Updates(question.number, lambda: self._session.counters.snapshot_bytes), None
        for event in reply:
            if isinstance(event, PrefillProgress):
                post(Reading(question.number, event.done, event.total, event.reused, event.eta_s))
            end = event if isinstance(event, End) else None
            updates.hear(event)
            if updates.tokens and (end is not None or updates.is_due()):
                post(updates.take())
        if end is None or (end.reason == "stopped" and not updates.tokens):
            raise StoppedError
        return Ended(question.number, end.reason, updates.figures)
