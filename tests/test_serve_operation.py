"""Turns of clients, the log of requests, and how a server ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ring_mlx.engine.events import Sampling
from ring_mlx.engine.fairness import ClientTurns
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.errors import OptionError, SessionError
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.serve.request_log import RequestLog
from ring_mlx.system.turn import FairLock
from tests.serving import CHAT, GOOD, answer_of, endless, metric, send, start_stream, user, wait_until


def test_clients_take_turns_for_places(serve, monkeypatch):
    engine, order, admit = serve(max_batch=1, store=False).engine, [], Scheduler.admit
    monkeypatch.setattr(Scheduler, "admit", lambda self, job: (order.append(job.client), admit(self, job))[1])
    body = {"messages": user("What is 1 + 1?"), "max_tokens": 2, "temperature": 0}
    jobs = [engine.prepare(parse_chat(body, Sampling())) for _ in range(7)]
    for job, client in zip(jobs, "aaaaabc", strict=True):
        job.client = client
    with engine._changed:  # all are there when the first is admitted
        for job in jobs:
            engine.submit(job)
    for job in jobs:
        answer_of(job)
    assert "".join(order) == "abcaaaa"


def test_clients_take_turns_in_reading(serve):
    """However many long prompts one client has, another's is read every second step."""
    engine = serve().engine
    scheduler = SimpleNamespace(_reading=[], _turns=ClientTurns())
    rows = [SimpleNamespace(request=Request("x", client=client), number=n) for n, client in enumerate("aaab")]
    scheduler._reading, seen = list(rows), ""
    for _ in range(8):
        row = Scheduler._next_to_read(scheduler)
        scheduler._reading.append(row)
        seen += f"{row.request.client}{row.number} "
    assert seen == "a0 b3 a1 b3 a2 b3 a0 b3 "
    assert engine.state == "ok"


def test_a_full_queue_has_room_for_another_client(serve, toy):
    server = serve(max_batch=1, max_queue=4)
    engine, stream = server.engine, start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "batch_size") == 1)

    def job(client):
        made = engine.prepare(parse_chat({"messages": user("x"), "max_tokens": 1}, Sampling(temp=0)))
        made.client = client
        engine.enter(made)
        return made

    burst = [job("a") for _ in range(4)]
    with pytest.raises(ApiError, match="4 requests wait already"):
        job("a")
    other = [job("b"), job("b")]
    with pytest.raises(ApiError, match="4 requests wait already"):
        job("b")
    for put_out in burst[2:]:
        assert isinstance(answer_of(put_out)[-1], SessionError)
    stream.close()
    for rest in (*burst[:2], *other):
        assert not isinstance(answer_of(rest)[-1], SessionError)


def test_models_compute_in_the_order_in_which_they_ask():
    lock, order = FairLock(), []

    def take(name):
        with lock:
            order.append(name)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(5)]
    with lock:
        for n, t in enumerate(threads):
            t.start()
            wait_until(lambda n=n: len(lock._waiting) == n + 1)
    with lock:  # those that waited come first, although it asks at once
        order.append("again")
    for t in threads:
        t.join()
    assert order == [0, 1, 2, 3, 4, "again"]
    assert not lock.is_held


def logged(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_is_a_line_without_its_text(serve, tmp_path):
    path = tmp_path / "log"
    server = serve(api_key="sesame")
    server.request_log = RequestLog(str(path))
    key = {"Authorization": "Bearer sesame"}
    body = {"messages": user("What is 27 + 35?"), "max_tokens": 60, "temperature": 0}
    asked = [("POST", CHAT, body, key)] * 2
    asked += [("POST", CHAT, b"{", key), ("GET", "/v1/models", b"", {}), ("GET", "/secret%0a?x=1", b"", key)]
    for n, (method, route, sent, headers) in enumerate(asked, 1):
        send(server, method, route, sent, **headers)
        wait_until(lambda n=n: path.read_text().count("\n") == n)  # a line follows its answer
    send(server, "GET", "/health")
    first, second, wrong, refused, unknown = logged(path)
    assert first | {"time": 0, "queue_s": 0, "first_token_s": 0, "duration_s": 0} == {
        "time": 0,
        "client": "127.0.0.1",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "model": "toy",
        "stream": False,
        "prompt_tokens": 21,
        "cached_tokens": 0,
        "completion_tokens": 37,
        "queue_s": 0,
        "first_token_s": 0,
        "duration_s": 0,
        "finish": "stop",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert 0 <= first["queue_s"] < first["first_token_s"] < first["duration_s"]
    assert second["cached_tokens"] > 0
    assert [line["status"] for line in (wrong, refused, unknown)] == [400, 401, 404]
    assert unknown["route"] == "other"
    whole = path.read_text()
    assert not any(word in whole for word in ("27 +", "sesame", "secret", "sum"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_client_that_leaves_is_logged(serve, toy, tmp_path):
    server = serve()
    server.request_log = RequestLog(str(tmp_path / "log"))
    stream = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    stream.close()
    wait_until(lambda: (tmp_path / "log").read_text())
    (line,) = logged(tmp_path / "log")
    assert (line["status"], line["completion_tokens"], line["finish"]) == ("gone", None, None)
    assert line["first_token_s"] > 0


def test_a_log_that_was_moved_is_made_anew(tmp_path):
    path, log = tmp_path / "log", RequestLog(str(tmp_path / "log"))
    log.write({"n": 1})
    path.rename(tmp_path / "log.1")
    log.write({"n": 2})
    path.unlink()
    log.write({"n": 3})
    log.close()
    assert (logged(tmp_path / "log.1"), logged(path)) == ([{"n": 1}], [{"n": 3}])


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capfd):
    with pytest.raises(OptionError, match=r"--log .* cannot be written"):
        RequestLog(str(tmp_path / "no" / "log"))
    log = RequestLog("/dev/full")
    for n in range(3):
        log.write({"n": n})
    assert capfd.readouterr().err.count("lines of --log are lost") == 1


@pytest.fixture
def process(tmp_path):
    """A server in a process of its own: it and its port."""
    made = []

    def start(*more):
        command = [sys.executable, "-m", "ring_mlx", "serve", "--port", "0", "--cache-dir", str(tmp_path / "store")]
        made.append(subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        port = int(re.search(r":(\d+)/v1", made[-1].stdout.readline())[1])
        assert "ready" in made[-1].stdout.readline()
        return made[-1], SimpleNamespace(server_port=port)

    yield start
    for one in made:
        one.kill()
        one.wait()
        one.stdout.close()


def test_a_server_that_is_told_to_end_finishes_its_answers(process, toy):
    one, server = process("--drain", "30", "--log", "-")
    body, found = endless(toy) | {"stream": False, "max_tokens": 500}, []
    t = threading.Thread(target=lambda: found.append(send(server, "POST", CHAT, body)))
    t.start()
    wait_until(lambda: metric(server, "batch_size") == 1)
    one.send_signal(signal.SIGTERM)
    wait_until(lambda: send(server, "GET", "/health")[2]["status"] == "draining")
    status, headers, answer = send(server, "POST", CHAT, GOOD)
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "10", "unavailable")
    t.join(60)
    assert found[0][0] == 200
    assert found[0][2]["usage"]["completion_tokens"] == 500
    assert one.wait(30) == 0
    lines = [json.loads(line) for line in one.stdout.read().splitlines()]
    assert [(line["status"], line.get("finish")) for line in lines] == [(503, None), (200, "length")]


def test_a_second_signal_ends_answers(process, toy):
    one, server = process("--drain", "60")
    stream = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    one.send_signal(signal.SIGTERM)
    wait_until(lambda: send(server, "GET", "/health")[2]["status"] == "draining")
    time.sleep(0.3)
    assert one.poll() is None
    one.send_signal(signal.SIGTERM)
    assert one.wait(30) == 0
    text = b""
    while piece := stream.recv(1 << 16):
        text += piece
    assert b"the server is closing" in text[-400:]
    stream.close()


def test_answers_that_take_too_long_are_ended(process, toy):
    one, server = process("--drain", "0.3s")
    stream = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    began = time.monotonic()
    one.send_signal(signal.SIGTERM)
    assert one.wait(30) == 0
    assert time.monotonic() - began < 10
    stream.close()
