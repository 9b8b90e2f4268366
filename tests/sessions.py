"""A session's scheduler driven on the test's own thread, with an account of what it should have read."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ring_mlx.engine import row as rows
from ring_mlx.engine.events import End, Sampling, SessionOptions, Statistics
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.engine.snapshots import common_prefix
from ring_mlx.errors import RingError

QUESTIONS = ("Quiet rivers run deep.", "Why?", "Tell me of 3 ships.", "And then?", "Zero or one?", "Say more about it.")


def common(a, b):
    """Length of the common prefix."""
    return common_prefix(np.asarray(a, dtype=np.int32), np.asarray(b, dtype=np.int32))


def options(**changes):
    """Those of a session that keeps nothing on disk and reads nothing ahead."""
    return SessionOptions(**({"model": "toy", "store": False, "read_ahead": False} | changes))


class DirectSession:
    """What `ring_mlx.Session` does, without its thread."""

    def __init__(self, model, tokenizer, given):
        self.loaded = LoadedModel(model, tokenizer, given)
        self.scheduler = Scheduler(self.loaded, Metrics())
        self.reader, self.pressure = self.scheduler.reader, self.scheduler.pressure
        self.save, self.use_idle_time = self.scheduler.save, self.scheduler.use_idle_time

    @classmethod
    def load(cls, given):
        loaded = LoadedModel.load(given)
        return cls(loaded.model, loaded.tokenizer, given)

    @property
    def counters(self):
        return self.scheduler.metrics.counters()

    def answer(self, request, emit):
        """Tell all events up to the last; raises what the request failed of."""
        self.scheduler.admit(request)
        while self.scheduler.busy:
            self._tell(request, emit)
            self.scheduler.step()
        self._tell(request, emit)

    @staticmethod
    def _tell(request, emit):
        while not request.events.empty():
            event = request.events.get()
            if isinstance(event, RingError):
                raise event.__cause__ or event
            emit(event)


class Recorder:
    """Keeps the logits of every token that any session chooses."""

    def __init__(self, monkeypatch):
        self.logits = []
        start = rows.start_sampling

        def recording(*args):
            sampler, processors, seed = start(*args)
            return sampler, [self._keep, *processors], seed

        monkeypatch.setattr(rows, "start_sampling", recording)

    def _keep(self, history, logits):
        self.logits.append(logits)
        return logits

    def take(self):
        """Those since the last call, [n, vocab]."""
        taken, self.logits = mx.concatenate(self.logits), []
        return np.array(taken)


class Talk:
    """Asks a session, and knows every token sequence that it has been through."""

    def __init__(self, session, **request):
        self.session = session
        self.request = {"sampling": Sampling(temp=0), "max_tokens": 18, "thinking_budget": 5} | request
        self.seen = []

    def ask(self, messages, **changes):
        """Answer; returns the statistics, the message and how many prompt tokens were never seen before."""
        events = []
        self.session.answer(Request(list(messages), **(self.request | changes)), events.append)
        statistics = next((e for e in events if isinstance(e, Statistics)), None)
        end = events[-1]
        assert isinstance(end, End)
        total = self.session.reader.live.tokens.tolist()
        prompt = total[: statistics.prompt_tokens] if statistics else total
        new = len(prompt) - max((common(prompt, s) for s in self.seen), default=0)
        self.seen += [prompt, total]
        return statistics, end.message, new


def fresh(chat, messages, **request):
    """The statistics and message of a session that knows nothing."""
    return Talk(DirectSession(*chat, options()), **request).ask(messages)
