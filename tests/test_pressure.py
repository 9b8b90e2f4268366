"""macOS is short of memory: snapshots go first, then MLX's buffers, and no answer changes."""

from __future__ import annotations

import math
import time
import weakref

import mlx.core as mx
import pytest

from ring_mlx.engine import pressure, session
from ring_mlx.engine.events import End, Sampling
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.pressure import Watch
from ring_mlx.engine.request import Request
from ring_mlx.engine.snapshots import SnapshotTree
from ring_mlx.system.macos import CRITICAL, NORMAL, WARNING
from tests.fake_mac import PRESSURE, Mac
from tests.serving import answer_of, ask, user, wait_until
from tests.sessions import QUESTIONS, DirectSession, Talk, options


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(pressure, "LOOK_S", 0.0)
    return Mac(monkeypatch, **{PRESSURE: NORMAL})


@pytest.fixture
def worker(chat):
    return DirectSession(*chat, options())


def talk(worker, questions=QUESTIONS[:3]):
    """A conversation, a prompt after the other."""
    one, history = Talk(worker, max_tokens=6), []
    for question in questions:
        history = user(question, *history)
        history.append(one.ask(history)[1])
    return history


def test_a_warning_takes_half_of_the_bytes_and_keeps_what_is_likeliest(mac, worker, monkeypatch):
    talk(worker)
    most, squeeze = [], SnapshotTree.squeeze
    monkeypatch.setattr(SnapshotTree, "squeeze", lambda tree, n: (most.append(n), squeeze(tree, n)))
    tree = worker.reader.tree
    before, count, latest = tree.nbytes, len(tree), tree.latest
    mac.values[PRESSURE] = WARNING
    for _ in range(3):
        worker.pressure.look()
    assert most == [before // 2] * 3  # and not half of what is left, each time
    assert 0 < tree.nbytes <= before // 2
    assert 0 < len(tree) < count
    assert tree.latest is latest
    assert latest in list(tree)


def test_what_is_critical_takes_all_that_no_prompt_has_got_to(mac, worker):
    history = talk(worker)
    tree = worker.reader.tree
    gone = [weakref.ref(s) for s in tree]
    ids = worker.loaded.prepare(Request(user("More?", *history))).prompt.ids
    worker.reader.start(ids)
    held = tree.held(worker.reader)
    mac.values[PRESSURE] = CRITICAL
    worker.pressure.look()
    assert list(tree) == [held]
    worker.reader.settle()
    worker.reader.forget()
    worker.pressure.look()
    assert len(tree) == tree.nbytes == 0
    assert tree.latest is None
    del held
    assert not any(s() for s in gone)  # nothing else keeps their arrays


def test_what_a_snapshot_held_goes_back_to_macos(mac, worker, monkeypatch):
    talk(worker)
    order, squeeze = [], SnapshotTree.squeeze
    monkeypatch.setattr(SnapshotTree, "squeeze", lambda *a: (order.append("snapshots"), squeeze(*a)))
    monkeypatch.setattr(mx, "clear_cache", lambda: order.append("buffers"))
    mac.values[PRESSURE] = WARNING
    worker.pressure.look()
    assert order == ["snapshots", "buffers"]


def test_once_all_is_normal_things_go_on(mac, worker):
    talk(worker)
    tree = worker.reader.tree
    mac.values[PRESSURE] = CRITICAL
    worker.pressure.look()
    history = talk(worker, QUESTIONS[:2])
    assert len(tree) == 0
    mac.values[PRESSURE] = WARNING  # less than critical, but what is gone stays gone
    worker.pressure.look()
    assert len(tree) == 0
    mac.values[PRESSURE] = NORMAL
    worker.pressure.look()
    one = Talk(worker)
    history = user("And?", *history)
    history.append(one.ask(history)[1])
    assert len(tree) > 0
    assert one.ask(user("Then?", *history))[0].reused_tokens > 0


@pytest.mark.parametrize("level", [WARNING, CRITICAL])
def test_answers_are_the_same_under_pressure(mac, chat, worker, level):
    said = talk(worker)
    short = DirectSession(*chat, options())
    mac.values[PRESSURE] = level
    assert talk(short) == said
    assert short.reader.tree.nbytes < worker.reader.tree.nbytes


def test_it_is_asked_between_the_steps_of_prompts_answers_and_reading_ahead(mac, chat):
    worker = DirectSession(*chat, options(read_ahead=True, prefill_step_tokens=8))
    looks, look = [], worker.pressure.look
    worker.pressure.look = lambda: (looks.append(worker.reader.read_tokens), look())
    events = []
    worker.answer(Request(user("Hello there, it is me."), sampling=Sampling(temp=0), max_tokens=6), events.append)
    prompt = worker.reader.read_tokens
    assert len({n for n in looks if n < prompt}) > 1
    assert looks.count(prompt) >= 6
    asked = len(looks)
    worker.use_idle_time(lambda: False)
    assert len(looks) > asked


def test_at_most_once_a_second(monkeypatch):
    mac, now = Mac(monkeypatch, **{PRESSURE: NORMAL}), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    watch = Watch(SnapshotTree(1000))
    for now[0] in (100.0, 100.3, 100.9, 101.0, 101.5, 102.0):
        watch.look()
    assert mac.asked == [PRESSURE] * 3
    assert watch.idle_s == pressure.IDLE_LOOK_S


def test_other_systems_are_asked_once(monkeypatch):
    mac = Mac(monkeypatch)
    watch = Watch(SnapshotTree(1000))
    for _ in range(3):
        watch.look()
    assert mac.asked == [PRESSURE]
    assert watch.idle_s is None
    assert watch._next == math.inf


def test_it_is_said_once(mac, worker):
    talk(worker)
    mac.values[PRESSURE] = CRITICAL
    worker.pressure.look()
    with pytest.warns(UserWarning, match=r"short of memory, so \d+ snapshots were dropped .* close other programs"):
        worker.use_idle_time(lambda: False)
    worker.use_idle_time(lambda: False)


def test_a_session_that_waits_gives_back_as_well(mac, monkeypatch, chat):
    monkeypatch.setattr(pressure, "IDLE_LOOK_S", 0.01)
    monkeypatch.setattr(LoadedModel, "load", classmethod(lambda cls, given, progress: cls(*chat, given)))
    with session.Session("toy", store=False, read_ahead=False) as one:
        ended = [e for e in one.send(user("Hello."), sampling=Sampling(temp=0), max_tokens=4) if isinstance(e, End)]
        assert ended
        assert one.counters.snapshots > 0
        mac.values[PRESSURE] = CRITICAL
        wait_until(lambda: one.counters.snapshots == 0)


def test_a_server_gives_back_while_it_answers(mac, monkeypatch, engine):
    monkeypatch.setattr(Watch, "tell", lambda self: None)
    one = engine()
    answer_of(ask(one, "Hello."))
    wait_until(lambda: one.gauges()["snapshots"] > 0)
    job = ask(one, "Hello again.", 1500)
    wait_until(lambda: one.gauges()["batch_size"] == 1)
    mac.values[PRESSURE] = CRITICAL
    wait_until(lambda: one.gauges()["snapshots"] == 0)
    assert one.gauges()["batch_size"] == 1
    one.drop(job)


def test_a_server_gives_back_while_it_waits(mac, monkeypatch, engine):
    monkeypatch.setattr(pressure, "IDLE_LOOK_S", 0.01)
    monkeypatch.setattr(Watch, "tell", lambda self: None)
    one = engine()
    right = answer_of(ask(one, "Hello again."))
    time.sleep(0.3)  # it waits now
    mac.values[PRESSURE] = CRITICAL
    wait_until(lambda: one.gauges()["snapshots"] == 0)
    under = answer_of(ask(one, "Hello again."))
    assert [e.text for e in under if hasattr(e, "text")] == [e.text for e in right if hasattr(e, "text")]
    wait_until(lambda: one.gauges()["snapshots"] == 0)
