"""The model's one thread: requests join the running batch between tokens and leave it."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from ring_mlx.engine.session import rest
from ring_mlx.errors import PromptError, RingError, TokenizerError
from ring_mlx.generation.defaults import filled
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.stream import check_lengths
from ring_mlx.model.model import Model
from ring_mlx.serve.encoding import Encoder
from ring_mlx.serve.failures import ModelLostError, bad, busy
from ring_mlx.serve.job import Job
from ring_mlx.serve.metrics import Metrics
from ring_mlx.serve.parts import Parts
from ring_mlx.serve.protocol import Asked
from ring_mlx.serve.settings import Settings
from ring_mlx.serve.work import Work
from ring_mlx.system.install import explained
from ring_mlx.system.terminal_text import note

Load = Callable[[Settings], Parts]

# How long the threads of requests have to pass on that all ends.
TELLING_S = 0.5


class Engine:
    """Loads a model on a thread of its own and answers requests there, several at once.

    Args:
        settings: What to load and how much at once.
        metrics: Where to count.
        load: Loads the model and makes what it is worked with; by default as one process does.
    """

    def __init__(self, settings: Settings, metrics: Metrics, load: Load | None = None) -> None:
        self.settings, self.metrics, self._load_parts = settings, metrics, load
        self._waiting: deque[Job] = deque()
        self._submitted = weakref.WeakSet[Job]()
        self._changed = threading.Condition()
        self._closed = False
        self._gauges: dict[str, float] = {}
        self._model: Model | None = None
        self._encoder: Encoder | None = None
        self._loaded, self._at_rest = threading.Event(), threading.Event()
        self.failure: RingError | None = None
        self._thread = threading.Thread(target=self._run, name="ring-mlx model", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """``loading``, ``ok``, ``failed`` or ``closed``."""
        if self._closed:
            return "closed"
        return "failed" if self.failure or self._at_rest.is_set() else "ok" if self._loaded.is_set() else "loading"

    @property
    def context_tokens(self) -> int | None:
        """The model's context, once it is loaded."""
        return self._model.config.context_tokens if self._model is not None else None

    def wait_until_loaded(self, timeout_s: float | None = None) -> bool:
        """Whether the model is there; also ends where loading failed.

        Raises:
            RingError: What loading failed of.
        """
        done = self._loaded.wait(timeout_s)
        if self.failure is not None:
            raise self.failure
        return done

    @property
    def encoder(self) -> Encoder:
        """Prepares requests.

        Raises:
            ApiError: 503 if the model is not there, or too many wait.
        """
        if self.state != "ok" or self._encoder is None:
            raise busy(f"the model is not ready ({self.state}); try again.", 5)
        if sum(not j.cancelled.is_set() for j in self._waiting.copy()) >= self.settings.max_queue:
            raise busy(f"{self.settings.max_queue} requests wait already; try again.")
        return self._encoder

    def prepare(self, asked: Asked, gone: Callable[[], bool] = lambda: False) -> Job:
        """Render, encode and measure a request, on the thread that brings it.

        Args:
            asked: The request.
            gone: Says whether the client has left.

        Raises:
            ApiError: If the model is not there, or the request does not fit it.
            GoneError: If the client leaves meanwhile.
        """
        encoder, prompt = self.encoder, None
        assert self._model is not None
        config = self._model.config
        try:
            prompt, renderer = encoder.prompt(asked, gone)
            count = len(prompt.ids)
            check_lengths(self._model, count, 0, 1, 1, asked.thinking_budget)
        except TokenizerError as e:
            raise bad(str(e), "messages" if asked.chat else "prompt", "template_error") from None
        except PromptError as e:
            code = "context_length_exceeded" if prompt is None or prompt.ids else "invalid_value"
            raise bad(str(e), "messages" if asked.chat else "prompt", code) from None
        asked = replace(asked, sampling=filled(asked.sampling, self._model.sampling))
        named = [*prompt.ids, *(asked.sampling.logit_bias or {})]
        if max(named) >= config.vocab_size or (asked.sampling.top_k or 0) >= config.vocab_size:
            raise bad(f"a token id or top_k is not below the vocabulary of {config.vocab_size}.", code="invalid_value")
        most = self.settings.max_tokens if asked.max_tokens is None else asked.max_tokens
        return Job(asked, prompt, renderer, within(most, config.context_tokens - count + 1))

    def submit(self, job: Job) -> None:
        """Let a prepared request wait for its place; its events tell the rest.

        Raises:
            ApiError: 503 if too many wait.
        """
        with self._changed:
            _ = self.encoder
            self._waiting.append(job)
            self._submitted.add(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: its place is free after the step at hand."""
        job.cancelled.set()
        with self._changed:
            self._changed.notify()

    def abandon(self) -> None:
        """Tell every request that the process ends, from any thread: the model's may wait for a lost rank for ever."""
        for job in list(self._submitted):
            job.events.put(busy("a process that holds a part of the model is lost, so the server ends.", 10))
        time.sleep(TELLING_S)

    def gauges(self) -> dict[str, float]:
        """How much waits, runs and is kept now."""
        with self._changed:
            return {"queue_length": len(self._waiting), **self._gauges}

    def close(self, timeout_s: float = 30.0) -> bool:
        """End what runs, save snapshots, free the model; returns whether the thread is at rest."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._at_rest.wait(timeout_s)

    def _run(self) -> None:
        """The thread's life. It comes to rest and never ends: see `rest`."""
        try:
            work: Work | None = self._load()
        except Exception as e:  # noqa: BLE001 whatever happens is told to those who ask
            e = explained(e) if isinstance(e, ImportError) else e
            self.failure, work = e if isinstance(e, RingError) else RingError(f"{type(e).__name__}: {e}"), None
        self._loaded.set()
        try:
            while work is not None and not self._closed:
                self._turn(work)
        except ModelLostError as e:
            self.failure = e.error
        except Exception as e:  # noqa: BLE001 nothing may end the thread with requests unanswered
            self.failure = RingError(f"the model's thread failed ({type(e).__name__}: {e}); start the server again.")
            note(traceback.format_exc())
        self._refuse_all(work)
        if work is not None:
            work.save()
            free, work, self._model = work.free_memory, None, None
            free()
        rest(self._at_rest)

    def _load(self) -> Work:
        parts = (self._load_parts or Parts.load)(self.settings)
        work = Work(parts, self.metrics)
        self._gauges = work.gauges()
        self._encoder = Encoder(parts.tokenizer, parts.model.config.context_tokens, self.settings.template_options)
        self._model = parts.model
        return work

    def _turn(self, work: Work) -> None:
        """Take in and let go, then a step for everyone; with nobody there, what is good for the next, then wait."""
        with self._changed:
            for job in [j for j in self._waiting if j.cancelled.is_set()]:
                self._waiting.remove(job)
                self.metrics.count("requests_finished_total", reason="cancelled")
            arrived = self._waiting[0] if self._waiting else None
        work.drop_cancelled()
        if arrived is not None and work.has_room(arrived):
            with self._changed:
                self._waiting.popleft()
            work.admit(arrived)
        elif not work.busy:
            work.use_idle_time(self._is_wanted)
            self._show(work)
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(work.pressure.idle_s or 60)
            return
        work.step()
        self._show(work)

    def _is_wanted(self) -> bool:
        return bool(self._waiting) or self._closed

    def _show(self, work: Work) -> None:
        gauges = work.gauges()
        with self._changed:
            self._gauges = gauges

    def _refuse_all(self, work: Work | None) -> None:
        error = busy("the server is closing.")
        if work is not None:
            work.fail_all(error)
        with self._changed:
            while self._waiting:
                self._waiting.popleft().events.put(error)
