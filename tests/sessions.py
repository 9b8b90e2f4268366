"""A worker driven on the test's own thread, with an account of what it should have read."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ring_mlx.engine import worker as session_worker
from ring_mlx.engine.events import End, Request, Sampling, SessionOptions, Statistics
from ring_mlx.engine.snapshots import common_prefix
from ring_mlx.engine.worker import Worker

QUESTIONS = ("Quiet rivers run deep.", "Why?", "Tell me of 3 ships.", "And then?", "Zero or one?", "Say more about it.")


def common(a, b):
    """Length of the common prefix."""
    return common_prefix(np.asarray(a, dtype=np.int32), np.asarray(b, dtype=np.int32))


def options(**changes):
    """Those of a session that keeps nothing on disk and reads nothing ahead."""
    return SessionOptions(**({"model": "toy", "store": False, "read_ahead": False} | changes))


class Recorder:
    """Keeps the logits of every token that any worker chooses."""

    def __init__(self, monkeypatch):
        self.logits = []
        start = session_worker.start_sampling

        def recording(*args):
            sampler, processors, seed = start(*args)
            return sampler, [self._keep, *processors], seed

        monkeypatch.setattr(session_worker, "start_sampling", recording)

    def _keep(self, history, logits):
        self.logits.append(logits)
        return logits

    def take(self):
        """Those since the last call, [n, vocab]; computed without the token that was never chosen."""
        taken, self.logits = mx.concatenate(self.logits), []
        return np.array(taken)


class Talk:
    """Asks a worker, and knows every token sequence that it has been through."""

    def __init__(self, worker, **request):
        self.worker = worker
        self.request = {"sampling": Sampling(temp=0), "max_tokens": 18, "thinking_budget": 5} | request
        self.seen = []

    def ask(self, messages, **changes):
        """Answer; returns the statistics, the message and how many prompt tokens were never seen before."""
        events = []
        self.worker.answer(Request(list(messages), **(self.request | changes)), events.append)
        statistics = next((e for e in events if isinstance(e, Statistics)), None)
        end = events[-1]
        assert isinstance(end, End)
        total = self.worker.reader.live.tokens.tolist()
        prompt = total[: statistics.prompt_tokens] if statistics else total
        new = len(prompt) - max((common(prompt, s) for s in self.seen), default=0)
        self.seen += [prompt, total]
        return statistics, end.message, new


def fresh(chat, messages, **request):
    """The statistics and message of a worker that knows nothing."""
    return Talk(Worker(*chat, "fresh", options()), **request).ask(messages)
