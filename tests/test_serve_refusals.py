"""What ``ring-mlx serve`` says to bodies, routes and bytes that are wrong."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket

import pytest

from tests.serving import (
    CHAT,
    GOOD,
    TOOLS,
    metric,
    send,
)

WRONG = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"[" * 50_000, 400),
    *((b'{"top_p": ' + b"[" * n + b"]" * n + b"}", 400) for n in (60, 70, 900, 960, 990)),
    (b'{"temperature": NaN}', 400),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400),
    ({}, 400),
    *((GOOD | change, 400) for change in (
        {"messages": []}, {"messages": {}}, {"messages": ["x"]}, {"messages": [{}]}, {"messages": [{"role": "wizard"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": ["x"]}]}, {"messages": [{"role": "assistant", "tool_calls": [1]}]},
        {"max_tokens": 0}, {"max_tokens": "1"}, {"max_tokens": True}, {"max_tokens": 1e300}, {"temperature": -1},
        {"temperature": "hot"}, {"top_p": 2}, {"top_k": 10**9}, {"seed": 1.5}, {"stop": [""]}, {"stop": [1]},
        {"stop": ["x"] * 17}, {"stream": "yes"}, {"stream_options": []}, {"logit_bias": {"x": 1}}, {"model": 1},
        {"logit_bias": {"999999": 1}}, {"top_logprobs": 3}, {"tools": [{}]}, {"tools": "x"}, {"thinking_budget": -1},
        {"chat_template_kwargs": {"chat_template": "x"}}, {"chat_template_kwargs": {"enable_thinking": [1]}},
    )),
    *((GOOD | change, 422) for change in (
        {"response_format": {"type": "xml"}}, {"adapters": "a"}, {"functions": [{}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    )),
    (GOOD | {"model": "other"}, 404),
]  # fmt: skip


def test_wrong_bodies_get_a_status_and_openais_error(server):
    for body, expected in WRONG:
        status, _, answer = send(server, "POST", CHAT, body) if body else send_empty(server)
        assert (status, set(answer)) == (expected, {"error"}), body
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in answer["error"]["message"]
    for prompt in (None, "", [], [[]], [-1], [10**9], [1.5], {"a": 1}):
        assert send(server, "POST", "/v1/completions", {"prompt": prompt})[0] == 400, prompt
    assert send(server, "POST", "/v1/completions", {"prompt": ["a", ["b"]]})[0] == 400
    assert send(server, "POST", CHAT, GOOD | {"unheard_of": 1, "user": "me", "stop": None})[0] == 200


def send_empty(server):
    return send(server, "POST", CHAT, b"", **{"Content-Length": "0"})


def test_wrong_routes_methods_and_sizes(server):
    assert send(server, "GET", "//[x?y=[")[0] == send(server, "GET", "/%00%ff")[0] == 404
    assert send(server, "GET", "/v1/models/?x=1")[0] == 200
    assert send(server, "GET", "/")[0] == send(server, "POST", "/v2", GOOD)[0] == 404
    status, headers, body = send(server, "GET", CHAT)
    assert (status, headers["Allow"], body["error"]["code"]) == (405, "POST", "method_not_allowed")
    assert send(server, "POST", "/health", GOOD)[0] == send(server, "BREW", CHAT)[0] == 405
    assert send(server, "HEAD", CHAT)[::2] == (405, "")
    assert send(server, "POST", CHAT, GOOD, **{"Content-Type": "text/plain"})[0] == 415
    assert send(server, "POST", CHAT, b"x" * 100_001)[0] == 413
    assert send(server, "POST", CHAT, b" " * 3_000_000)[0] == 413
    assert send(server, "POST", CHAT, **{"Content-Length": "-5"})[0] == 400
    assert send(server, "POST", CHAT)[0] == 400


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n", b"411"),
    ],
)
def test_broken_http(server, raw, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as s:
        s.sendall(raw)
        answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert set(json.loads(body)) == {"error"}


def test_bytes_at_random_never_break_it(server):
    """Seeded damage to a good body: flipped bytes, cut ends, swapped values."""
    chance = random.Random(9)
    values = [None, True, -1, 0, 1e308, "", "x", [], [[]], {}, {"type": "text"}, [{"role": "user"}], "\x00", 10**30]
    full = GOOD | {"temperature": 0, "stop": ["a"], "stream": False, "tools": TOOLS, "top_p": 1, "logit_bias": {"1": 1}}
    for _ in range(150):
        body = full | {chance.choice(list(full)): chance.choice(values)}
        data = bytearray(json.dumps(body | {"max_tokens": 1}), "utf-8")
        for _ in range(chance.choice([0, 0, 1, 3])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        status, _, answer = send(server, "POST", CHAT, bytes(data) or b" ")
        assert status in (200, 400, 404, 422), (data, answer)
        assert ("error" in answer) == (status != 200)
    assert metric(server, "batch_size") == metric(server, "reading") == metric(server, "queue_length") == 0


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    for body, expected in ((GOOD, 200), (GOOD | {"top_p": 9}, 400), (GOOD | {"stream": True}, 200), (GOOD, 200)):
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == expected
        if body.get("stream"):
            assert text.endswith(b"data: [DONE]\n\n")
    connection.close()


def test_a_body_where_none_belongs_is_not_taken_for_a_request(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as s:
        s.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 28\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n  "
        )
        answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
    assert answer.count(b"HTTP/1.1 200") == 1


def test_health_and_metrics(server):
    assert send(server, "GET", "/health")[::2] == (200, {"status": "ok", "model": "toy"})
    send(server, "POST", CHAT, GOOD)
    text = send(server, "GET", "/metrics")[2]
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|ring_mlx_\w+(\{(\w+=\"[^\"]*\",?)+\})? [0-9.e+-]+", line), line
    assert metric(server, 'http_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert metric(server, "generated_tokens_total") == 1
    assert metric(server, "time_to_first_token_seconds_count") == 1
