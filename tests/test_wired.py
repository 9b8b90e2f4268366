"""A model's memory is wired while it computes and given back when it rests, at every door."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from ring_mlx.cli import main
from ring_mlx.distributed import follower
from ring_mlx.doctor import decay_check, decay_choice
from ring_mlx.engine.events import Sampling
from ring_mlx.engine.request import Request
from ring_mlx.errors import OptionError
from ring_mlx.generation import decoding
from ring_mlx.model.model import Model
from ring_mlx.system import wired
from ring_mlx.system.wired import Wired
from tests.fake_mac import Mac
from tests.serving import answer_of, ask, user, wait_until
from tests.sessions import DirectSession, options
from tests.tiny import make_model


class Wiring:
    """Notes what is asked of MLX's wired limit, as on a Mac whose working set has `MOST` bytes."""

    MOST = 1000

    def __init__(self, monkeypatch):
        self.limit, self.order = 5, []
        monkeypatch.setattr(wired, "_most_bytes", lambda: self.MOST)
        monkeypatch.setattr(mx, "set_wired_limit", self._set)
        monkeypatch.setattr(mx, "synchronize", lambda stream=None: self.order.append("synchronize"))

    def _set(self, limit):
        before, self.limit = self.limit, limit
        self.order.append(limit)
        return before

    def watch(self, monkeypatch, model_class):
        """Note the limit at each call of a model; returns the list."""
        seen, call = [], model_class.__call__
        monkeypatch.setattr(model_class, "__call__", lambda *a, **k: (seen.append(self.limit), call(*a, **k))[1])
        return seen


@pytest.fixture
def wiring(monkeypatch):
    return Wiring(monkeypatch)


def test_the_first_raises_and_the_last_puts_back_after_the_work(wiring):
    with Wired():
        with Wired():
            assert wiring.order == [wiring.MOST]
        assert wiring.order == [wiring.MOST, "synchronize"]
    assert wiring.order == [wiring.MOST, "synchronize", "synchronize", 5]


def test_holding_and_releasing_twice_changes_nothing(wiring):
    one = Wired()
    one.release()
    one.hold()
    one.hold()
    one.release()
    one.release()
    assert wiring.order == [wiring.MOST, "synchronize", 5]


def test_threads_share_one_limit(wiring):
    at_once, wrong = threading.Barrier(4), []

    def work():
        for _ in range(50):
            at_once.wait()
            with Wired():
                if wiring.limit != wiring.MOST:
                    wrong.append(wiring.limit)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert wiring.limit == 5
    assert wired._holders == 0


def test_it_is_put_back_where_work_fails(wiring, monkeypatch):
    def lost(stream=None):
        raise RuntimeError("the command buffer failed")

    with pytest.raises(ZeroDivisionError), Wired():
        raise ZeroDivisionError
    assert wiring.limit == 5
    monkeypatch.setattr(mx, "synchronize", lost)
    with pytest.raises(RuntimeError), Wired():
        pass
    assert (wiring.limit, wired._holders) == (5, 0)


def test_a_refused_limit_costs_no_answer(wiring, monkeypatch):
    def refuse(limit):
        raise ValueError("Setting a wired limit larger than the maximum working set size is not allowed.")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with Wired():
        pass
    assert wired._holders == 0


@pytest.mark.parametrize(("release", "most"), [("15.0", 48 << 30), ("26.1", 48 << 30), ("14.7.1", None)])
def test_never_more_than_the_working_set_nor_before_macos_15(monkeypatch, release, most):
    Mac(monkeypatch, release).metal()
    assert wired._most_bytes() == most


def test_without_metal_nothing_happens(monkeypatch):
    Mac(monkeypatch)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("no Metal"))
    with Wired():
        pass


@pytest.mark.parametrize("take", [4, 2])
def test_while_tokens_are_generated(wiring, monkeypatch, take):
    model = make_model()
    seen = wiring.watch(monkeypatch, type(model))
    tokens = decoding.generate_step([1, 2, 3], model, model.make_cache(), max_tokens=4, prefill_step_size=2)
    for _ in range(take):
        next(tokens)
    tokens.close()
    assert seen
    assert set(seen) == {wiring.MOST}
    assert wiring.limit == 5


def test_while_a_session_answers_and_reads_ahead(wiring, monkeypatch, chat):
    seen = wiring.watch(monkeypatch, Model)
    worker = DirectSession(*chat, options(read_ahead=True))
    request = Request(user("Hello there."), sampling=Sampling(temp=0), max_tokens=4)
    worker.answer(request, lambda event: None)
    answered = len(seen)
    assert wiring.limit == 5
    worker.use_idle_time(lambda: False)
    assert len(seen) > answered
    assert set(seen) == {wiring.MOST}
    assert wiring.limit == 5
    with pytest.raises(OptionError):
        worker.answer(Request("Text.", continue_last=True), lambda event: None)
    assert wiring.limit == 5


def test_while_the_server_is_busy_and_no_longer(wiring, monkeypatch, engine):
    seen = wiring.watch(monkeypatch, Model)
    one = engine()
    for job in [ask(one, "Hello."), ask(one, "Hello there.")]:
        answer_of(job)
    wait_until(lambda: wiring.limit == 5)
    assert set(seen) == {wiring.MOST}
    assert wiring.order.count(wiring.MOST) == 1


def test_a_server_that_closes_in_mid_answer_gives_back(wiring, engine):
    one = engine()
    ask(one, "Hello.", 1000)
    wait_until(lambda: wiring.limit == wiring.MOST)
    assert one.close()
    assert wiring.limit == 5


def test_while_a_follower_is_told_to_work(wiring, monkeypatch):
    orders = iter([{"do": "start"}, {"do": "step"}, {"do": "remove"}, {"do": "close"}])
    state = {"start": 1, "step": 1, "remove": 0}
    one = follower.Follower.__new__(follower.Follower)
    one._wired, one._readers, one._batch = Wired(), {}, []
    seen = []

    def do(order, _):
        seen.append(wiring.limit)
        one._batch = [0] * state[order["do"]]

    monkeypatch.setattr(one, "_do", do)

    class Channel:
        def receive(self):
            return {"gone": [], **next(orders)}

    one.run(Channel())
    assert seen == [wiring.MOST] * 3
    assert wiring.order == [wiring.MOST, "synchronize", 5]


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--suite", "demo", "--limit", "1", "--task", "add", "--max-tokens", "2", "--quiet"),
        ("bench", "--random", "golden", "-p", "16", "-g", "2", "-n", "1", "--batch-size", "2", "--quiet"),
    ],
)
def test_while_a_command_measures(wiring, monkeypatch, capsys, words):
    seen = wiring.watch(monkeypatch, Model)
    assert main(list(words)) == 0
    assert set(seen) == {wiring.MOST}
    assert wiring.limit == 5


def test_while_a_decay_is_checked(wiring, monkeypatch):
    seen = []
    monkeypatch.setattr(decay_choice, "packaged_parts", lambda *_: [])
    monkeypatch.setattr(decay_check, "tokens_a_second", lambda model: 100.0)
    monkeypatch.setattr(decay_check, "compare", lambda *_: seen.append(wiring.limit))
    decay_choice.check(make_model(), None, lambda line: None)
    assert (seen, wiring.limit) == ([wiring.MOST], 5)
