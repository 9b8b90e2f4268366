"""Requests are let in by their likely length; answers that outgrow the memory wait, and go on as if they had not."""

from __future__ import annotations

import queue

import mlx.core as mx
import pytest

from ring_mlx import demo_model_path
from ring_mlx.engine import room
from ring_mlx.engine.events import AnswerText, End, ThinkingText
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.model import memory
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.protocol import parse_chat
from tests.serving import SUMS, user

LONG = {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture
def scheduler(toy):
    settings = Settings(demo_model_path(), "toy", store=False, read_ahead=False)
    return Scheduler(LoadedModel(*toy, settings), Metrics())


def request_of(scheduler, text, **change):
    request = parse_chat({"messages": user(text), "temperature": 0} | LONG | change, scheduler._options.sampling)
    request.prepared = scheduler.loaded.prepare(request)
    return request


def finish(scheduler, requests):
    """The texts of requests that are admitted as there is room, and how many answers waited at most."""
    waiting, paused = list(requests), 0
    while waiting or scheduler.busy:
        if waiting and scheduler.has_room(waiting[0]):
            scheduler.admit(waiting.pop(0))
        scheduler.step()
        paused = max(paused, len(scheduler._paused))
    return [text_of(request) for request in requests], paused


def text_of(request):
    said = []
    while True:
        try:
            event = request.events.get_nowait()
        except queue.Empty:
            raise AssertionError("no end") from None
        if isinstance(event, End):
            return "".join(said), event.reason
        said += [event.text] if isinstance(event, (AnswerText, ThinkingText)) else []


@pytest.mark.parametrize("change", [{}, {"temperature": 1.2, "seed": 4}, {"repeat_penalty": 1.3, "thinking_budget": 5}])
def test_answers_that_wait_for_memory_are_those_of_each_alone(scheduler, monkeypatch, change):
    alone = [finish(scheduler, [request_of(scheduler, text, **change)])[0][0] for text in SUMS[:3]]
    monkeypatch.setattr(room, "LOOK_EVERY_STEPS", 3)
    monkeypatch.setattr(room, "GROW_TOKENS", 4)
    monkeypatch.setattr(room, "LIKELY_TOKENS", 8)
    monkeypatch.setattr(room, "fit", lambda config, held, reading, lengths, draft: len(lengths) * max(lengths) <= 120)
    together, paused = finish(scheduler, [request_of(scheduler, text, **change) for text in SUMS[:3]])
    assert together == alone
    assert paused >= 1


def test_an_answer_that_waits_can_be_left_and_ended(scheduler, monkeypatch):
    monkeypatch.setattr(room, "LOOK_EVERY_STEPS", 1)
    first, second, third = (request_of(scheduler, text) for text in SUMS[:3])
    for request in (first, second, third):
        scheduler.admit(request)
    while len(scheduler._rows) < 3:
        scheduler.step()
    monkeypatch.setattr(room, "fit", lambda config, held, reading, lengths, draft: False)
    scheduler.step()
    assert [row.request for row in scheduler._paused] == [second, third]
    assert not scheduler.has_room(request_of(scheduler, "x"))
    second.drop()
    scheduler.drop()
    assert [row.request for row in scheduler._paused] == [third]
    first.drop()
    scheduler.drop()
    assert scheduler.busy
    third.stopped.set()
    while scheduler.busy:
        scheduler.step()
    assert text_of(third)[1] == "stopped"


def test_what_is_likely_and_what_fits(toy, monkeypatch):
    assert room.likely(10, 100_000) == 10 + room.LIKELY_TOKENS
    assert room.likely(10, 5) == 15
    assert room.likely(10, 100_000, 9_000) == 10 + 9_000 + room.GROW_TOKENS
    config = toy[0].config
    held, needed = mx.get_active_memory(), 3 * memory.cache_bytes(config, 500)
    monkeypatch.setattr(memory, "budget_bytes", lambda: held + needed)
    assert room.fit(config, 0, (), [500, 1, 2])
    assert not room.fit(config, 0, (), [501, 1, 2])
    assert room.fit(config, memory.cache_bytes(config, 100), (), [520, 1, 2])


def test_requests_without_a_limit_run_together(scheduler, monkeypatch):
    """Where memory holds one whole context, several answers of unknown length are let in all the same."""
    config = scheduler.loaded.model.config
    held, whole = mx.get_active_memory(), memory.cache_bytes(config, config.context_tokens)
    monkeypatch.setattr(room, "LIKELY_TOKENS", 64)
    monkeypatch.setattr(memory, "budget_bytes", lambda: held + whole)
    for text in SUMS[:2]:
        request = request_of(scheduler, text, max_tokens=-1, ignore_eos=False)
        assert request.prepared.limit > config.context_tokens - 100
        assert scheduler.has_room(request)
        scheduler.admit(request)
    assert not scheduler.has_room(request_of(scheduler, "x " * 3000))
    scheduler.drop()
