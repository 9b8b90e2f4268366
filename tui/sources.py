"""`ring_mlx.Session` as the engine uses it: its events become messages.

Importing this module is cheap; making a source imports MLX, on the session's own thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ring_mlx import (
    AnswerText,
    End,
    PrefillProgress,
    Revised,
    Sampling,
    Session,
    Statistics,
    Thinking,
    ThinkingText,
)
from tui import paths
from tui.batch import Batch
from tui.messages import Ended, Figures, Loaded, Loading, ModelChoice, Post, Question, Reading
from tui.messages import Sampling as Chosen

TOY = "toy"


class StoppedError(Exception):
    """The user stopped the answer while its prompt was being read."""


class Source(Protocol):
    """A loaded model, used on the engine's thread only."""

    def answer(self, question: Question, stopped: threading.Event, post: Post) -> Ended:
        """Post the answer's messages and return the last; raises StoppedError between steps of the prompt."""

    def stop(self) -> None:
        """End the running answer; the one method that any thread may call."""

    def close(self) -> None:
        """Free the model."""


Load = Callable[[ModelChoice, Post], Source]


def load(choice: ModelChoice, post: Post) -> Source:
    """Load a model and say so.

    Raises:
        RingError: If it cannot be had or does not fit.
    """
    return SessionSource(choice, post)


class SessionSource:
    """A session, which reuses whatever it has read before.

    Args:
        choice: The model.
        post: Takes `Loading` and `Loaded`.
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
            thinking_start=thinking.start,
            answer_room=thinking.answer_room,
            on_loading=lambda event: post(Loading(name, event.done, event.total)),
        )
        try:
            info = self._session.wait_until_loaded()
        except BaseException:
            self._session.close(0)
            raise
        quantisation = "" if info.quantization == "none" else info.quantization
        s = info.sampling
        plain = Chosen(temp=s.temp, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p)
        post(Loaded(name, info.context_tokens, quantisation, info.memory_limit_bytes, plain))

    def stop(self) -> None:
        """End the running answer; from any thread."""
        self._session.stop()

    def close(self) -> None:
        """Save what was read and free the model."""
        self._session.close()

    def answer(self, question: Question, stopped: threading.Event, post: Post) -> Ended:
        """Post the answer's messages and return the last.

        Raises:
            StoppedError: If the prompt was not read to its end.
            RingError: If the question cannot be answered.
        """
        s = question.sampling
        reply = self._session.send(
            list(question.messages),
            sampling=_sampling(s),
            max_tokens=s.max_tokens,
            thinking_budget=s.thinking_budget,
            continue_last=question.continues,
        )
        if stopped.is_set():
            reply.stop()
        heard = _Heard(question.number, self._session)
        for event in reply:
            heard.add(event, post)
        if heard.end is None or (heard.end.reason == "stopped" and not heard.tokens):
            raise StoppedError
        return Ended(question.number, heard.end.reason, heard.batch.figures)


def _sampling(s: Chosen) -> Sampling:
    given = {name: getattr(s, name) for name in ("xtc_probability", "xtc_threshold") if getattr(s, name) is not None}
    return Sampling(temp=s.temp, top_p=s.top_p, min_p=s.min_p, top_k=s.top_k, seed=s.seed, **given)


class _Heard:
    """One answer's events as messages; figures are measured here until the session gives its own."""

    def __init__(self, number: int, session: Session) -> None:
        self.number, self.batch, self.tokens = number, Batch(number), 0
        self.end: End | None = None
        self._session, self._started, self._first = session, time.monotonic(), 0.0
        self._figures = Figures(cache_bytes=session.counters.snapshot_bytes)

    def add(self, event: object, post: Post) -> None:
        """Take one event."""
        if isinstance(event, PrefillProgress):
            self._figures = replace(self._figures, prompt_tokens=event.total, reused_tokens=event.reused)
            post(Reading(self.number, event.done, event.total, event.reused, event.eta_s))
        elif isinstance(event, ThinkingText):
            self.batch.add(event.text, "", True, self._measured())
        elif isinstance(event, AnswerText):
            self.batch.add("", event.text, False, self._measured())
        elif isinstance(event, Revised):
            self.batch.revise(event.thought, self._measured())
        elif isinstance(event, Statistics):
            self.batch.add("", "", False, Figures(**vars(event), cache_bytes=self._session.counters.snapshot_bytes))
        elif isinstance(event, End):
            self.end = event
        if self.tokens and (self.end is not None or self.batch.is_due()):
            post(self.batch.take())

    def _measured(self) -> Figures:
        now = time.monotonic()
        self._first = self._first or now
        self.tokens += 1
        wait_s = self._first - self._started
        read = self._figures.prompt_tokens - self._figures.reused_tokens
        self._figures = replace(
            self._figures,
            generated_tokens=self.tokens,
            prompt_tps=read / max(wait_s, 1e-9),
            generation_tps=(self.tokens - 1) / (now - self._first) if self.tokens > 1 else 0.0,
            time_to_first_token_s=wait_s,
        )
        return self._figures
