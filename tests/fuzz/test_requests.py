"""Requests to ``ring-mlx serve`` that are nearly right: bodies, heads and chunks, mutated where they have structure.

Each ends in 2xx, or 4xx with an error in JSON, or a closed connection; nothing is left in the log or in the server.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_mlx import demo_model_path
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.server import Server
from tests.fuzz.profile import fuzz
from tests.serving import metric, wait_until

WALL_S = 60
EXPECTED = "ring-mlx: [serve] the answer is empty", "ring-mlx: [serve] left out of requests"
CHANCE = st.randoms(use_true_random=True)  # seeded by hypothesis; its own choices are not as even
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/toy",
    "/v1/responses/resp_1",
    "/health",
    "/metrics",
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
CHAT = {
    "model": "toy",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        {"role": "user", "content": "What is 2 + 3?", "name": "me"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "chat_template_kwargs": {"enable_thinking": False},
    "response_format": {"type": "text"},
    "logprobs": True,
    "top_logprobs": 2,
}
COMMON = {
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["x", "yy"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100, "7": 1.5},
    "thinking_budget": 1,
    "n": 1,
}
ITEMS = [
    {"role": "developer", "content": "s"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "t"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": '{"a": [1]}'},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}]},
    {"type": "web_search_call", "id": "ws_1"},
    {"role": "user", "content": "What is 2 + 3?"},
]
FLAT = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
RESPONSE = {
    "model": "toy",
    "input": ITEMS,
    "instructions": "i",
    "tools": [FLAT, {"type": "namespace", "name": "n", "tools": [FLAT]}, {"type": "web_search"}],
    "tool_choice": "auto",
    "reasoning": {"effort": "none", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "text"}},
    "metadata": {"a": "b"},
    "max_output_tokens": 2,
    "top_logprobs": 1,
    "truncation": "auto",
    "stream": True,
}
RESULT = {"type": "tool_result", "tool_use_id": "u", "content": [{"type": "text", "text": "r"}], "is_error": True}
PAPER = {"type": "document", "title": "d", "source": {"type": "text", "media_type": "text/plain", "data": "p"}}
MESSAGE = {
    "model": "toy",
    "messages": [
        {"role": "user", "content": [PAPER, {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "ring-mlx"},
                {"type": "tool_use", "id": "u", "name": "f", "input": {"a": [1]}},
            ],
        },
        {"role": "user", "content": [RESULT, {"type": "text", "text": "<system-reminder>"}]},
        {"role": "system", "content": "s"},
    ],
    "system": [{"type": "text", "text": "s"}],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}, {"type": "bash_20250124", "name": "bash"}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1},
    "output_config": {"effort": "high"},
    "stop_sequences": ["x"],
    "max_tokens": 2,
    "stream": True,
}
BODIES = {
    PATHS[0]: CHAT | COMMON,
    PATHS[1]: {"prompt": "What is", "logprobs": 1} | COMMON,
    "/v1/responses": RESPONSE,
    "/v1/messages?beta=true": MESSAGE,
    "/messages/count_tokens": MESSAGE,
}

JUNK = [
    *(None, True, False, 0, -1, 1, 1 << 31, 1 << 53, 1 << 64, 10**63, 10**300, 1e308, -0.0, 0.5, "", "x", [], {}),
    *("\ud800", "a\udfffb", "\x00", "\u202e\x1b[2J", "<|role_end|></think><tool_call>", "{", "9" * 70, "[" * 90, "user", "tool"),
    *([None], [[]], [{}], {"": {}}, {"type": "text"}, {"role": "user", "content": "x"}, [1, "a"], ["", ""], {"a": [{}]}),
    *(["x"] * 5000, "x" * 50_000, {str(i): 1 for i in range(11_000)}, [{"role": "user", "content": "x"}] * 4097),
    *(json.loads("[" * n + "]" * n) for n in (20, 63, 64, 65, 200)),
]  # fmt: skip


def place(chance, body):
    """A container within a body, and the key of one of its values; messages more often than what is beside them."""
    holder, key = (
        body,
        chance.choice(
            [*body, *(k for k in ("messages", "messages", "input", "input", "tools", "prompt") if k in body)]
        ),
    )
    while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.8:
        holder = holder[key]
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    return holder, key


def mutated(chance):
    """A route and a body with a few values replaced, removed, repeated or added, and perhaps a few bytes changed."""
    path = chance.choice(list(BODIES))
    body = copy.deepcopy(BODIES[path])
    for name in chance.sample(list(COMMON), chance.randrange(len(COMMON))):
        if name != "max_tokens":
            body.pop(name, None)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        holder, key = place(chance, body)
        match chance.choice(["replace", "replace", "replace", "remove", "more"]):
            case "replace":
                holder[key] = copy.deepcopy(chance.choice(JUNK))
            case "remove" if len(body) > 1:
                del holder[key]
            case _ if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder[key]) for _ in range(chance.randrange(6)))
            case _:
                holder[chance.choice(["", "x", "\ud83d", "name", "type", "max_length"])] = chance.choice(JUNK)
    for name in ("max_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):  # a long answer is right, and takes long
            body[name] = 2 if body[name] == -1 else min(body[name], 2)
    data = bytearray(json.dumps(body, ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice([0, 0, 0, 0, 1, 3])):
        at = chance.randrange(len(data) + 1)
        data[at : at + chance.randrange(3)] = chance.choice([b"", b"\xff", b'"', b"\\", b"{", b"]", b",", b"\0", b"e9"])
    return path, bytes(data)


LINES = [
    *(b"Host: localhost", b"Host: 127.0.0.1:80", b"Host: evil.example.com", b"Host:", b"Host: [::1", b"Host: \xff"),
    *(b"Content-Length: 0", b"Content-Length: 2", b"Content-Length: 999999999999", b"Content-Length: -1"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked"),
    *(b"Content-Type: application/json", b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Expect: x"),
    *(b"Connection: close", b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", b"Origin: http://localhost"),
    *(b"Origin: null", b"Authorization: Bearer \xe9", b"X-Api-Key:", b"Sec-Fetch-Site: cross-site", b"Range: bytes=0-1"),
    *(b" folded", b"No colon", b"Space : x", b": x", b"X: a\rb", b"X: a\0b", b"X: " + b"y" * 70_000, b"Expect: 100-continue"),
]  # fmt: skip
TARGETS = [
    *(p.encode() for p in PATHS),
    *(b"*", b"/", b"//", b"/%00%ff", b"/v1/models/%2e%2e", b"http://localhost/health", b"http://evil.com/health"),
    *(
        b"localhost:80",
        b"",
        b"/" + b"a" * 70_000,
        b"/v1/models/" + b"%" * 300,
        b"http://[::1/health",
        b"/\xff",
        b"/a b",
    ),
]
METHODS = [
    b"GET",
    b"GET",
    b"GET",
    b"POST",
    b"POST",
    b"HEAD",
    b"OPTIONS",
    b"CONNECT",
    b"PRI",
    b"get",
    b"G\0T",
    b"BREW",
    b"",
]
VERSIONS = [b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.x", b"http/1.1", b""]


def heads(chance):
    """Bytes that begin like requests, one or more in a row."""
    sent = b""
    for _ in range(chance.randint(1, 3)):
        lines = [b" ".join((chance.choice(METHODS), chance.choice(TARGETS), chance.choice(VERSIONS)))]
        lines += [b"Host: localhost"] * (chance.random() < 0.8) + chance.choices(LINES, k=chance.randrange(5))
        if chance.random() < 0.1:
            lines.append(chance.randbytes(12))
        end = chance.choice([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n"])
        sent += end.join([*lines, b"", chance.choice([b"", b"", b"{}", b"0\r\n\r\n"])])
    return sent


def chunked(chance):
    """A body in chunks of which some are not what they say."""
    body, sent = json.dumps(BODIES[PATHS[0]] | {"stream": chance.random() < 0.5}).encode(), b""
    rarely = chance.choice([0, 0.03, 0.1])
    while body:
        size = chance.randint(1, 200)
        said, extension, end, piece, body = b"%x" % len(body[:size]), b"", b"\r\n", body[:size], body[size:]
        if chance.random() < rarely:
            said = chance.choice([said.upper(), b"000" + said, b"zz", b"-1", b"", b"f" * 21, b"f" * 20, b"0x1", b" 1"])
        if chance.random() < rarely:
            extension = chance.choice([b";a", b';a="\\"', b" ", b"\t;a", b";" + b"a" * 70_000, b";\n", b"\0"])
        if chance.random() < rarely:
            end = chance.choice([b"", b"\n", b"XX", b"\r\n\r\n"])
        sent += said + extension + b"\r\n" + piece + end
    trailers = [b"", b"", b"A: b\r\n", b"Content-Length: 5\r\n", b" x\r\n", b"no colon\r\n", b"a: b\r\n" * 20_000]
    return sent + b"0\r\n" + chance.choice(trailers) + chance.choice([b"\r\n"] * 4 + [b"", b"\n"])


@pytest.fixture(scope="module")
def server():
    """Its deadlines are short, so that what is cut off ends soon."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEAD_S", "BODY_S", "IDLE_S", "LINGER_S"):
            patch.setattr(f"ring_mlx.serve.wire.{name}", 0.25)
        settings = Settings(demo_model_path(), "toy", store=False, read_ahead=False, max_tokens=2)
        made = Server(settings, port=0, max_body_bytes=300_000)
        made.start()
        assert made.engine.wait_until_loaded(60)
        yield made
        assert made.close()


def check(server, sent, capsys):
    """Send all, read to the end, and hold the answers against the promise."""
    started, said = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=WALL_S) as s:
        try:
            s.sendall(sent)
            said = b"".join(iter(lambda: s.recv(1 << 16), b""))
        except ConnectionError:
            pass
    assert time.monotonic() - started < WALL_S
    answers = re.split(rb"(?:^|(?<=[}\n]))HTTP/1\.1 (?=\d{3} )", said)[1:]
    assert bool(answers) == bool(said)
    for answer in answers:
        status, body = int(answer[:3]), answer.partition(b"\r\n\r\n")[2]
        assert status < 500 or status == 505, answer
        if status >= 400 and body:  # HEAD has none
            told = json.loads(body)
            error = told["error"]
            assert set(error) == ({"message", "type"} if "type" in told else {"message", "type", "param", "code"})
            assert len(error["message"]) < 1000
    noted = capsys.readouterr().err.splitlines()
    assert [line for line in noted if not line.startswith(EXPECTED)] == []
    return [int(a[:3]) for a in answers]


def framed(path, body, how=b"Content-Length: %d\r\n"):
    head = (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        % path.encode()
    )
    return head + (how % len(body) if b"%" in how else how) + b"\r\n" + body


@fuzz(45)
@given(chance=CHANCE)
def test_bodies(server, capsys, chance):
    assert len(check(server, framed(*mutated(chance)), capsys)) == 1, "a whole request has an answer"


@fuzz(72)
@given(chance=CHANCE)
def test_heads(server, capsys, chance):
    check(server, heads(chance), capsys)


@fuzz(48)
@given(chance=CHANCE)
def test_chunks(server, capsys, chance):
    check(server, framed(PATHS[0], chunked(chance), b"Transfer-Encoding: chunked\r\n"), capsys)


def test_the_whole_bodies_are_answered(server, capsys, monkeypatch):
    """What is mutated is right as it stands; and nothing of the other tests is left."""
    for name in ("HEAD_S", "BODY_S"):
        monkeypatch.setattr(f"ring_mlx.serve.wire.{name}", WALL_S)
    for path, body in BODIES.items():
        assert check(server, framed(path, json.dumps(body).encode()), capsys) == [200]
    assert [metric(server, name) for name in ("queue_length", "reading", "batch_size")] == [0, 0, 0]
    wait_until(lambda: not server.slots._taken)
