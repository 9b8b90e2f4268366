"""Clients of ``ring-mlx serve`` that leave, too many of them, and a model that fails."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest

from ring_mlx.engine.events import AnswerText, Sampling, ThinkingText
from ring_mlx.engine.fairness import ClientTurns
from ring_mlx.engine.pressure import Watch
from ring_mlx.engine.request import Request
from ring_mlx.engine.row import Row
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.engine.snapshots import SnapshotTree
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.system.wired import Wired
from tests.serving import (
    GREEDY,
    SUMS,
    client_of,
    endless,
    metric,
    send,
    start_stream,
    user,
    wait_until,
)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(serve, toy, stream):
    server = serve(max_batch=1)
    s = start_stream(server, endless(toy) | {"stream": stream})
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    s.close()
    left_at = metric(server, "generated_tokens_total")
    wait_until(lambda: metric(server, "batch_size") == 0, 20)
    assert metric(server, 'requests_finished_total{reason="cancelled"}') == 1
    assert metric(server, "generated_tokens_total") - left_at < 40
    with client_of(server) as client:
        assert client.chat.completions.create(messages=user(SUMS[1]), **GREEDY).choices[0].message.content


def test_a_cancelled_job_gets_at_most_one_token_more(serve, toy):
    engine = serve().engine
    body = endless(toy)
    jobs = [engine.prepare(parse_chat(body, Sampling(temp=0))) for _ in range(2)]
    whole = engine.prepare(parse_chat(body | {"max_tokens": -1}, Sampling()))
    assert whole.prepared.limit == toy[0].config.max_position_embeddings - len(whole.prepared.prompt.ids) + 1
    for job in jobs:
        engine.submit(job)
    said = [0, 0]
    while said[0] < 8:
        for n, job in enumerate(jobs):
            while not job.events.empty():
                said[n] += isinstance(job.events.get(), (ThinkingText, AnswerText))
        time.sleep(0.001)
    engine.drop(jobs[0])
    wait_until(lambda: engine.gauges()["batch_size"] == 1)
    assert jobs[0].events.qsize() <= 2
    wait_until(lambda: jobs[1].events.qsize() > 5)
    engine.drop(jobs[1])
    wait_until(lambda: engine.gauges()["batch_size"] == 0)


def test_reading_takes_half_of_the_time_beside_answers(monkeypatch):
    """By a clock of its own, on which a step of a prompt takes as long as four tokens."""
    work, done, clock = Scheduler.__new__(Scheduler), [], [0.0]
    prompt = SimpleNamespace(request=Request("x"))
    work._reading, work._rows, work._owed_s, work._paused = deque([prompt]), {1: "row"}, 0.0, ()
    work._turns, work._wired, work.pressure = ClientTurns(), Wired(), Watch(SnapshotTree(0))
    monkeypatch.setattr("ring_mlx.engine.scheduler.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def took(kind, seconds):
        done.append(kind)
        clock[0] += seconds

    work._read = lambda reading: (took("read", 4), work._reading.append(reading))
    work._generate = lambda: took("token", 1)
    work.show, work._shown = lambda: None, 0.0
    for _ in range(12):
        work.step()
    assert done == ["read", "token", "token", "token", "token"] * 3
    work._rows = {}
    work.step()
    assert done[-1] == "read"


def test_a_long_prompt_does_not_stop_the_others(serve, toy):
    server = serve(prefill_step_tokens=32)
    s = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    late = start_stream(server, {"messages": user("3 + 4, " * 60), "stream": True})
    wait_until(lambda: metric(server, "batch_size") == 2, 120)
    s.close()
    late.close()


def test_a_client_that_leaves_while_it_waits_or_is_read(serve, toy):
    server = serve(max_batch=1, prefill_step_tokens=8)
    long = {"messages": user("3 + 4, " * 900), "stream": True}
    reading, waiting = start_stream(server, long), start_stream(server, long)
    wait_until(lambda: metric(server, "reading") == 1 and metric(server, "queue_length") == 1)
    waiting.close()
    wait_until(lambda: metric(server, "queue_length") == 0, 20)
    reading.close()
    wait_until(lambda: metric(server, "reading") == 0, 20)
    assert metric(server, 'requests_finished_total{reason="cancelled"}') == 2
    assert metric(server, "generated_tokens_total") == 0


def test_a_full_queue_refuses(serve, toy):
    server = serve(max_batch=1, max_queue=1)
    sockets = [start_stream(server, endless(toy))]
    wait_until(lambda: metric(server, "batch_size") == 1)
    sockets.append(start_stream(server, endless(toy)))
    wait_until(lambda: metric(server, "queue_length") == 1)
    status, headers, body = send(server, "POST", "/v1/chat/completions", {"messages": user("x")})
    assert (status, headers["Retry-After"], body["error"]["type"]) == (503, "1", "server_error")
    sockets[0].close()
    wait_until(lambda: metric(server, "queue_length") == 0)
    assert server.close(), "a running answer holds nothing up"
    assert b'"code": "unavailable"' in b"".join(iter(lambda: sockets[1].recv(1 << 16), b""))
    sockets[1].close()


def test_what_does_not_fit_into_memory_beside_the_others_waits(serve, toy, monkeypatch):
    server = serve()
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 1)
    sockets = [start_stream(server, endless(toy)) for _ in range(2)]
    wait_until(lambda: metric(server, "batch_size") == 1 and metric(server, "queue_length") == 1)
    sockets[0].close()
    wait_until(lambda: metric(server, "batch_size") == 1 and metric(server, "queue_length") == 0)
    sockets[1].close()


def test_a_failure_in_the_model_is_told_and_forgotten(serve, monkeypatch, toy, capfd):
    server = serve()
    model = server.engine.loaded.model
    broken = threading.Event()
    monkeypatch.setattr(type(model), "__call__", _breaking(type(model).__call__, broken))
    s = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    broken.set()
    assert b'"code": "internal_error"' in b"".join(iter(lambda: s.recv(1 << 16), b""))
    s.close()
    broken.clear()
    assert send(server, "POST", "/v1/chat/completions", {"messages": user(SUMS[0]), "temperature": 0})[0] == 200
    assert "made to fail" in capfd.readouterr().err


def test_a_row_that_fails_leaves_the_batch_and_no_other_does(serve, monkeypatch, toy, capfd):
    server, take, broken = serve(), Row.take, threading.Event()

    def breaking(row, token, logprobs):
        if broken.is_set() and row.limit == 3999:
            raise ValueError("made to fail")
        return take(row, token, logprobs)

    monkeypatch.setattr(Row, "take", breaking)
    fails, goes_on = start_stream(server, endless(toy) | {"max_tokens": 3999}), start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "batch_size") == 2)
    broken.set()
    assert b'"code": "internal_error"' in b"".join(iter(lambda: fails.recv(1 << 16), b""))
    wait_until(lambda: metric(server, "batch_size") == 1)
    assert metric(server, 'requests_finished_total{reason="failed"}') == 1
    seen = metric(server, "generated_tokens_total")
    wait_until(lambda: metric(server, "generated_tokens_total") > seen)
    for s in (fails, goes_on):
        s.close()
    assert "made to fail" in capfd.readouterr().err


def _breaking(call, broken):
    def called(*args, **kwargs):
        if broken.is_set():
            raise ValueError("made to fail")
        return call(*args, **kwargs)

    return called
