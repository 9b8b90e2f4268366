"""What is asked beside a conversation changes nothing in it, waits for everything and is ended by everything."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace

import pytest

from ring_mlx import AnswerText, End, Sampling, Session, Statistics, ThinkingText
from ring_mlx.engine.model_thread import ModelThread

GREEDY = {"sampling": Sampling(temp=0), "max_tokens": 24}
TALK = [{"role": "user", "content": "My name is Ann and I like tea. What is 3 + 4?"}]
OTHER = [{"role": "user", "content": "Write a title for: What is 3 + 4? It is 7."}]


def asked(session, messages, **more):
    """The text, the statistics and the end of an answer."""
    text, statistics, end = "", None, None
    for event in session.send(messages, **{**GREEDY, **more}):
        text += event.text if isinstance(event, (AnswerText, ThinkingText)) else ""
        statistics = event if isinstance(event, Statistics) else statistics
        end = event if isinstance(event, End) else end
    return text, statistics, end


def lived(folder, store, between):
    """Two turns with something between them: both answers, tokens reused for the second, and what is kept."""
    with Session(folder, store=store, read_ahead=False) as session:
        first = asked(session, TALK)
        between(session)
        talk = [*TALK, first[2].message, {"role": "user", "content": "And 5 + 6?"}]
        second = asked(session, talk)
        counters = session.counters
        return first[0], second[0], second[1].reused_tokens, counters.snapshots, counters.snapshot_bytes


@pytest.mark.parametrize("budget", [0, 1])
def test_it_disturbs_neither_prefix_reuse_nor_snapshots_nor_the_store(chat_folder, tmp_path, budget):
    def aside(session):
        text, statistics, _ = asked(session, OTHER, aside=True, thinking_budget=budget)
        assert text
        assert statistics.reused_tokens == 0
        again = asked(session, TALK, aside=True)  # also where it asks the same
        assert again[1].reused_tokens == 0

    plain = lived(chat_folder, tmp_path / "plain", lambda session: asked(session, OTHER, aside=True))
    files = sorted(p.name for p in (tmp_path / "plain").rglob("*") if p.is_file())
    alone = lived(chat_folder, tmp_path / "alone", lambda session: None)
    assert lived(chat_folder, tmp_path / "with", aside) == plain == alone
    assert files == sorted(p.name for p in (tmp_path / "alone").rglob("*") if p.is_file())
    assert alone[2] > 0


def test_any_other_request_ends_it_running_or_waiting(chat_folder):
    with Session(chat_folder, store=False) as session:
        running = session.send(OTHER, aside=True, max_tokens=1500, sampling=Sampling(temp=0), thinking_budget=1400)
        for event in running:
            if isinstance(event, (AnswerText, ThinkingText)):
                break
        waiting = session.send(OTHER, aside=True, **GREEDY)
        session.stop()  # of the conversation there is nothing to stop
        question = session.send(TALK, max_tokens=1500, sampling=Sampling(temp=0), thinking_budget=1400)
        session.stop()
        assert list(question)[-1].reason == "stopped"
        ends = [list(reply)[-1] for reply in (running, waiting)]
        assert [end.reason for end in ends] == ["stopped", "stopped"]
        assert asked(session, OTHER, aside=True)[2].reason in ("stop", "length")


def test_it_waits_for_what_was_asked_before_and_stop_is_not_meant_for_it(chat_folder):
    with Session(chat_folder, store=False) as session:
        order, ended = [], threading.Event()
        question = session.send(TALK, max_tokens=200, sampling=Sampling(temp=0), thinking_budget=190)

        def follow():
            list(beside)
            order.append("aside")
            ended.set()

        beside = session.send(OTHER, aside=True, **GREEDY)
        thread = threading.Thread(target=follow)
        thread.start()
        session.stop()
        assert list(question)[-1].reason == "stopped"
        order.append("question")
        assert ended.wait(60)
        thread.join()
        assert order == ["question", "aside"]


def test_closing_and_failing_end_it_and_nothing_else(chat_folder):
    with Session(chat_folder, store=False) as session:
        first = asked(session, TALK)
        with pytest.raises(Exception, match="context"):
            asked(session, [{"role": "user", "content": "word " * 5000}], aside=True)
        talk = [*TALK, first[2].message, {"role": "user", "content": "And 5 + 6?"}]
        assert asked(session, talk)[1].reused_tokens > 0
        left = session.send(OTHER, aside=True, max_tokens=1500, thinking_budget=1400)
    assert list(left)[-1].reason == "stopped"


def test_a_request_that_comes_while_the_waiting_ones_are_looked_at_waits():
    thread = object.__new__(ModelThread)
    thread._closed, thread._changed, thread._waiting = False, threading.Condition(), deque()

    class Waiting:
        """Another request comes while this one is looked at."""

        @property
        def aside(self):
            coming = threading.Thread(target=come, daemon=True)
            coming.start()
            coming.join(0.05)
            return True

    def come():
        with thread._changed:
            thread._waiting.append(SimpleNamespace(aside=True))

    thread._waiting.extend([Waiting(), SimpleNamespace(aside=True)])
    assert not thread._is_wanted()
