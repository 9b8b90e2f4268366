"""Random lives of a session against a model that recomputes everything."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ring_mlx.engine.events import End, PrefillProgress, Sampling, ThinkingText
from ring_mlx.engine.request import Request
from tests.fuzz.profile import TIMES
from tests.sessions import DirectSession, Recorder, options

TEXTS = st.sampled_from(["Hi.", "Why so?", "Quite a long question about ships, kings and cabbages. " * 3, "9 or 10?"])
BUDGETS = st.sampled_from([0, 100_000, 400_000, 1 << 40])
WIDEST = 1500


class Life(RuleBasedStateMachine):
    """Conversations that are continued, edited, branched, stopped, saved, loaded and evicted in any order."""

    chat = recorder = None

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.settings = options(store=self.folder, prefill_step_tokens=24, snapshot_every_tokens=64, read_ahead=True)
        self.session = DirectSession(*self.chat, self.settings)
        self.talks = [[]]

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(text=TEXTS, at=st.integers(0, 9), system=st.booleans())
    def send(self, text, at, system):
        talk = self.talks[at % len(self.talks)]
        before = [{"role": "system", "content": "Be brief."}] if system and not talk else talk
        messages = [*before, {"role": "user", "content": text}]
        self.talks[at % len(self.talks)] = [*messages, self.answer(messages)]

    @precondition(lambda self: any(self.talks))
    @rule(text=TEXTS, at=st.integers(0, 9), turn=st.integers(0, 9), keep=st.booleans())
    def edit_or_branch(self, text, at, turn, keep):
        talk = self.talks[at % len(self.talks)]
        users = [n for n, m in enumerate(talk) if m["role"] == "user"]
        if not users:
            return
        messages = [*talk[: users[turn % len(users)]], {"role": "user", "content": text}]
        after = [*messages, self.answer(messages)]
        if keep:
            self.talks.append(after)
        else:
            self.talks[at % len(self.talks)] = after

    @precondition(lambda self: any(self.talks))
    @rule(at=st.integers(0, 9))
    def regenerate(self, at):
        talk = self.talks[at % len(self.talks)]
        if talk:
            talk[-1] = self.answer(talk[:-1])

    @rule(text=TEXTS, at=st.integers(0, 9), after=st.integers(1, 8))
    def send_and_stop(self, text, at, after):
        self.answer([*self.talks[at % len(self.talks)], {"role": "user", "content": text}], stop_after=after)

    @rule()
    def rest(self):
        self.session.use_idle_time(lambda: False)

    @rule(steps=st.integers(0, 4))
    def rest_shortly(self, steps):
        left = iter(range(steps))
        self.session.use_idle_time(lambda: next(left, None) is None)

    @rule()
    def restart(self):
        self.session = DirectSession(*self.chat, self.settings)

    @rule(budget=BUDGETS)
    def evict(self, budget):
        self.session.reader.tree.budget_bytes = budget
        self.session.reader.tree.evict()

    @rule(budget=st.sampled_from([0, 200_000, 1 << 40]))
    def collect(self, budget):
        self.session.reader.store.collect(budget)

    @invariant()
    def bytes_are_true(self):
        tree = self.session.reader.tree
        blocks = {b for s in tree for b in s.blocks}
        assert tree.nbytes == sum(b.nbytes for b in blocks) + sum(s.own_bytes for s in tree)
        assert tree.nbytes <= tree.budget_bytes or (tree.budget_bytes and len(tree) == 1)

    def answer(self, messages, stop_after=None):
        request = Request(messages, Sampling(temp=0), max_tokens=6, thinking_budget=2)
        events = []

        def emit(event):
            events.append(event)
            if stop_after is not None and len(events) >= stop_after:
                request.stopped.set()

        read = self.session.reader.read_tokens
        self.session.answer(request, emit)
        end = events[-1]
        assert isinstance(end, End)
        assert end.reason in (("stop", "length") if stop_after is None else ("stop", "length", "stopped"))
        self.check_progress([e for e in events if isinstance(e, PrefillProgress)], read)
        if any(isinstance(e, ThinkingText) for e in events) or end.message:
            self.check_logits(next(e.total for e in events if isinstance(e, PrefillProgress)))
        return end.message

    def check_progress(self, progress, read):
        assert progress[-1].done - progress[0].reused == self.session.reader.read_tokens - read
        assert [p.done for p in progress] == sorted(p.done for p in progress)

    def check_logits(self, prompt_tokens):
        """Every token was chosen from the logits of a model that reads all before it at once."""
        found = self.recorder.take()
        sequence = self.session.reader.live.tokens
        model, _ = self.chat
        start = prompt_tokens - 1
        assert len(sequence) - prompt_tokens in (len(found) - 1, len(found)), "each but the last of all was fed"
        logits = model(mx.array(sequence)[None])[0]
        for n in range(len(found)):
            if start + n < len(sequence):
                assert np.abs(found[n] - np.array(logits[start + n])).max() < 1e-4


@pytest.mark.filterwarnings("ignore:.cache. .* do not hold two snapshots")
def test_random_lives(chat, monkeypatch):
    monkeypatch.setattr(Life, "chat", chat)
    monkeypatch.setattr(Life, "recorder", Recorder(monkeypatch))
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=8 * TIMES, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


if __name__ == "__main__":
    pytest.main([__file__])
