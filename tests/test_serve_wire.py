"""``ring-mlx serve`` and raw HTTP/1.1: bodies in chunks, what could be read in two ways, slow and idle clients."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time

import pytest

from ring_mlx import demo_model_path
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.server import Server
from tests.serving import CHAT, GOOD, send, wait_until

HOST, JSON, CLOSE = b"Host: localhost\r\n", b"Content-Type: application/json\r\n", b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HEALTH, POST = b"GET /health HTTP/1.1\r\n" + HOST, b"POST " + CHAT.encode() + b" HTTP/1.1\r\n" + HOST + JSON
BODY = json.dumps(GOOD).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def make(**options):
    server = Server(Settings(demo_model_path(), "toy", store=False, read_ahead=False), port=0, **options)
    server.start()
    assert server.engine.wait_until_loaded(60)
    return server


@pytest.fixture(scope="module")
def server():
    made = make()
    yield made
    assert made.close()


@pytest.fixture
def small():
    """One with few places for connections."""
    made = make(max_connections=4)
    yield made
    assert made.close()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def rest(s):
    return b"".join(iter(lambda: s.recv(1 << 16), b""))


def exchange(server, *pieces):
    """All that the server says until it closes, as pairs of status and body."""
    with connect(server) as s:
        for piece in pieces:
            s.sendall(piece)
        answers = re.split(rb"HTTP/1\.1 (?=\d)", rest(s))[1:]
    return [(int(a[:3]), a.partition(b"\r\n\r\n")[2]) for a in answers]


def statuses(server, *pieces):
    return [status for status, _ in exchange(server, *pieces)]


def chunks(body, size, extension=b"", trailers=b""):
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"


# Bodies


@pytest.mark.parametrize("more", [{}, {"extension": b';a="b"'}, {"trailers": b"Expires: never\r\n"}])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_chunks_is_read(server, size, more):
    ((status, body),) = exchange(server, POST + CHUNKED + CLOSE + b"\r\n", chunks(BODY, size, **more))
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 1)


def test_a_body_in_chunks_has_the_same_limit(small):
    small.max_body_bytes = 1000
    blank = b" " * 990
    for sent in (chunks(blank + BODY, 50), chunks(b" " * 3_000_000, 100_000)):
        ((status, body),) = exchange(small, POST + CHUNKED + b"\r\n", sent)
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    assert statuses(small, POST + CHUNKED + b"\r\n", chunks(b" " * 20, 1, b";" + b"a" * 70_000)) == [400]
    assert statuses(small, POST + CHUNKED + b"\r\n", chunks(BODY, 100, trailers=b"a: b\r\n" * 30_000)) == [400]


def test_chunks_too_many_to_be_meant(server, monkeypatch):
    monkeypatch.setattr("ring_mlx.serve.wire.MOST_CHUNKS", 50)
    assert statuses(server, POST + CHUNKED + b"\r\n", chunks(b" " * 60, 1)) == [413]


def test_a_client_that_only_sends_still_reads_why_it_is_refused(server):
    for framing, body in (
        (b"Content-Length: 40000000\r\n", b" " * 40_000_000),
        (CHUNKED, chunks(b" " * 40_000_000, 1 << 20)),
    ):
        ((status, answer),) = exchange(server, POST + framing + b"\r\n", body)
        assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")
    started = time.monotonic()
    assert statuses(server, POST + b"Expect: 100-continue\r\nContent-Length: 40000000\r\n\r\n") == [413]
    assert time.monotonic() - started < 5, "it waited for a body that it had refused"


def test_expect(server):
    with connect(server) as s:
        s.sendall(POST + LENGTH + CLOSE + b"Expect: 100-continue\r\n\r\n")
        assert s.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        s.sendall(BODY)
        assert rest(s).startswith(b"HTTP/1.1 200 ")
    assert statuses(server, POST + LENGTH + b"Expect: tea\r\n\r\n") == [417]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "x"])
def test_a_coded_body_is_refused(server, coding):
    status, headers, answer = send(server, "POST", CHAT, GOOD, **{"Content-Encoding": coding})
    assert (status, headers["Accept-Encoding"], answer["error"]["code"]) == (415, "identity", "bad_content_encoding")
    assert send(server, "POST", CHAT, GOOD, **{"Content-Encoding": "identity"})[0] == 200


def test_the_type_must_be_said(server):
    for kind in (b"", b"Content-Type: text/plain\r\n", b"Content-Type: application/jsonp\r\n", b"Content-Type: \r\n"):
        head = POST.replace(JSON, kind)
        assert statuses(server, head + LENGTH + b"\r\n" + BODY) == [415], kind
    assert send(server, "POST", CHAT, GOOD, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


# What could be read in two ways

TWICE = [HOST, JSON, LENGTH, b"Authorization: Bearer x\r\n", b"X-Api-Key: x\r\n", b"Origin: http://localhost\r\n"]
AMBIGUOUS = {
    "two lengths": POST + b"Content-Length: 5\r\n" + LENGTH,
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n",
    "signed length": POST + b"Content-Length: +5\r\n",
    "negative length": POST + b"Content-Length: -5\r\n",
    "hexadecimal length": POST + b"Content-Length: 0x5\r\n",
    "length with a space": POST + b"Content-Length: 1 0\r\n",
    "endless length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n",
    "chunks and a length": POST + LENGTH + CHUNKED,
    "a length and chunks": POST + CHUNKED + LENGTH,
    "chunks twice": POST + CHUNKED + CHUNKED,
    "chunks of HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED,
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n",
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n',
    "folded": HEALTH + b"X: a\r\n b\r\n",
    "folded length": POST + b"Content-Length:\r\n 5\r\n",
    "folded at once": HEALTH.replace(HOST, b" X: a\r\n" + HOST),
    "space before the colon": POST + b"Content-Length : 5\r\n",
    "space before the name": POST + b" Content-Length: 5\r\n",
    "no colon": HEALTH + b"nonsense\r\n",
    "no name": HEALTH + b": x\r\n",
    "bare CR": HEALTH + b"X: a\rContent-Length: 5\r\n",
    "bare LF": HEALTH + b"X: a\nContent-Length: 5\r\n",
    "only LF": HEALTH.replace(b"\r\n", b"\n") + b"\n",
    "NUL": HEALTH + b"X: a\0b\r\n",
    "two spaces": HEALTH.replace(b" /", b"  /"),
    "tab": HEALTH.replace(b" /", b"\t/"),
    "no version": HEALTH.replace(b" HTTP/1.1", b""),
    "no host": HEALTH.replace(HOST, b""),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    **{f"{line.partition(b':')[0].decode()} twice": POST.replace(line, b"") + line + line for line in TWICE},
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_could_be_read_in_two_ways_is_refused(server, name):
    hidden = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"
    ((status, body),) = exchange(server, AMBIGUOUS[name] + b"\r\n", hidden)
    assert (status, json.loads(body)["error"]["code"]) == (400, "bad_http")


@pytest.mark.parametrize(
    "sent", [b"zz\r\n", b"-1\r\n", b"1;\nGET\r\n", b"1\r\n{XX\r\n", b" 1\r\n{\r\n", b"0x1\r\n{\r\n", b"\r\n"]
)
def test_broken_chunks(server, sent):
    assert statuses(server, POST + CHUNKED + b"\r\n", sent) == [400]


@pytest.mark.parametrize("body", [b"", BODY])
@pytest.mark.parametrize(
    "end", [b"\n", b"A: b\n\n", b"A: b\n\r\n", b"A: b\r\n\n", b"A: b\r\n c\r\n\r\n", b"A: b\nC: d\r\n\r\n"]
)
def test_chunks_that_could_end_in_two_places(server, body, end):
    """A proxy that reads on to the next \\r\\n would send the request behind them as a part of this one."""
    sent = chunks(body, 1000)[:-2] + end + HEALTH + b"\r\n"
    for pieces in ([sent], [sent[i : i + 5] for i in range(0, len(sent), 5)]):
        ((status, answer),) = exchange(server, POST + CHUNKED + b"\r\n", *pieces)
        assert (status, json.loads(answer)["error"]["code"]) == (400, "bad_http")


def test_requests_in_one_go_are_answered_in_turn(server):
    posts = (
        POST + LENGTH + b"\r\n" + BODY,
        POST + CHUNKED + b"\r\n" + chunks(BODY, 9),
        b"\r\n" + HEALTH + CLOSE + b"\r\n",
    )
    found = exchange(server, b"".join(posts))
    assert [(s, json.loads(b).get("object")) for s, b in found] == [(200, "chat.completion")] * 2 + [(200, None)]


def test_a_stream_for_http_1_0_ends_with_the_connection(server):
    body = json.dumps(GOOD | {"stream": True}).encode()
    head = POST.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
    ((status, text),) = exchange(server, head + body)
    assert (status, text.endswith(b"data: [DONE]\n\n"), b"\r\n" in text) == (200, True, False)


def test_a_body_without_a_length_is_not_taken_for_a_request(server):
    assert statuses(server, POST + b"\r\n", HEALTH + b"\r\n") == [411]


# Slow and idle clients


def test_a_place_is_free_when_its_client_has_left(small, monkeypatch):
    for _ in range(12):
        assert statuses(small, HEALTH + CLOSE + b"\r\n") == [200]
    wait_until(lambda: not small.slots._taken)


def test_idle_and_slow_connections_give_way(small):
    body = POST + LENGTH + b"\r\n" + BODY[:-1]
    for begun in (b"", HEALTH, HEALTH + b"\r\n", body):
        held = [connect(small) for _ in range(12)]
        for s in held:
            try:
                s.sendall(begun)
            except OSError:  # has given way already
                continue
        assert statuses(small, HEALTH + CLOSE + b"\r\n") == [200]
        assert statuses(small, POST + LENGTH + CLOSE + b"\r\n" + BODY) == [200]
        for s in held:
            s.close()


def test_idle_ones_give_way_before_those_that_send(small):
    sending = [connect(small) for _ in range(2)]
    for s in sending:
        s.sendall(POST + LENGTH + CLOSE + b"\r\n" + BODY[:-1])
    idle = [connect(small) for _ in range(2)]
    wait_until(lambda: sorted(stage for stage, _ in small.slots._waiting.values()) == [0, 0, 2, 2])
    for _ in range(4):
        idle.append(connect(small))
    for s in sending:
        s.sendall(BODY[-1:])
        assert rest(s).startswith(b"HTTP/1.1 200")
        s.close()
    for s in idle:
        s.close()


def test_clients_that_do_not_read_give_way(small):
    small.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)  # its connections inherit that
    held = [connect(small) for _ in range(4)]
    for s in held:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 13)
        s.sendall((b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n") * 500)
    wait_until(lambda: [stage for stage, _ in small.slots._waiting.values()] == [3] * 4, 30)
    assert statuses(small, HEALTH + CLOSE + b"\r\n") == [200]
    for s in held:
        s.close()


def test_answers_do_not_give_way(serve, toy):
    from tests.serving import endless, metric, start_stream

    server = serve(max_batch=2)
    streams = [start_stream(server, endless(toy)) for _ in range(2)]
    wait_until(lambda: metric(server, "batch_size") == 2)
    server.slots._most = 2
    wait_until(lambda: len(server.slots._taken) == 2)
    with connect(server) as s:
        assert rest(s).startswith(b"HTTP/1.1 503 ")
    for s in streams:
        s.close()


def test_bodies_together_have_a_bound(small):
    """The slowest to send gives way; requests that are being answered do not, and short ones need no room."""
    small.slots._most_bytes = 2_500_000
    head, most = POST + CLOSE + b"Content-Length: %d\r\n\r\n", 1_000_000
    held = []
    for count in range(1, 4):
        held.append(connect(small))
        held[-1].sendall(head % most + b" " * (most - 1))
        size = min(count, 2) * (most - 1)
        wait_until(lambda size=size: sum(small.slots._held.values()) == size)
    with contextlib.suppress(ConnectionError):
        assert held[0].recv(1) == b""
    held[1].sendall(b"x")
    assert rest(held[1]).startswith(b"HTTP/1.1 400 ")
    wait_until(lambda: sum(small.slots._held.values()) == most - 1)
    small.slots.work(next(iter(small.slots._held)))  # as while it is answered
    ((status, body),) = exchange(small, head % 2_000_000, b" " * 2_000_000)
    assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
    assert statuses(small, POST + LENGTH + CLOSE + b"\r\n" + BODY) == [200]
    for s in held:
        s.close()
    wait_until(lambda: not small.slots._held)


def drip(s, data):
    """Send a byte after the other until the other side has had enough; returns what it said."""
    s.settimeout(0.05)
    for i in range(len(data)):
        s.sendall(data[i : i + 1])
        try:
            return s.recv(1 << 16)
        except TimeoutError:
            continue
    return b""


def test_heads_and_bodies_have_a_deadline_however_they_drip(server, monkeypatch):
    monkeypatch.setattr("ring_mlx.serve.wire.HEAD_S", 0.5)
    monkeypatch.setattr("ring_mlx.serve.wire.BODY_S", 0.5)
    with connect(server) as s:
        assert drip(s, HEALTH + b"A: " + b"a" * 500).startswith(b"HTTP/1.1 408 ")
    with connect(server) as s:
        s.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        assert drip(s, b" " * 500).startswith(b"HTTP/1.1 408 ")
    monkeypatch.setattr("ring_mlx.serve.wire.IDLE_S", 0.2)
    with connect(server) as s:
        assert rest(s) == b""
