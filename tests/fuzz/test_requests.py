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
from ring_mlx.serve.server import Server
from ring_mlx.serve.settings import Settings
from tests.fuzz.profile import fuzz
from tests.serving import metric, wait_until

WALL_S = 20
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/toy", "/health", "/metrics"]
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
BODIES = {PATHS[0]: CHAT | COMMON, PATHS[1]: {"prompt": "What is", "logprobs": 1} | COMMON}

deep = st.integers(1, 200).map(lambda n: json.loads("[" * n + "]" * n))
JUNK = [
    *(None, True, False, 0, -1, 1, 1 << 31, 1 << 53, 1 << 64, 10**63, 10**300, 1e308, -0.0, 0.5, "", "x", [], {}),
    *("\ud800", "a\udfffb", "\x00", "\u202e\x1b[2J", "<|role_end|></think><tool_call>", "{", "9" * 70, "[" * 90, "user", "tool"),
    *([None], [[]], [{}], {"": {}}, {"type": "text"}, {"role": "user", "content": "x"}, [1, "a"], ["", ""], {"a": [{}]}),
    *(["x"] * 5000, "x" * 50_000, {str(i): 1 for i in range(11_000)}, [{"role": "user", "content": "x"}] * 4097),
    *(json.loads("[" * n + "]" * n) for n in (20, 63, 64, 65, 200)),
]  # fmt: skip
junk = st.one_of(st.sampled_from(JUNK), st.sampled_from(JUNK), st.text(max_size=20), st.integers(), st.floats())


@st.composite
def places(draw, body):
    """A container within a body, and the key of one of its values."""
    holder, key = (
        body,
        draw(st.sampled_from([*body, *(k for k in ("messages", "tools", "prompt", "stop") if k in body)])),
    )
    while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 3)):
        holder = holder[key]
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    return holder, key


@st.composite
def mutated(draw):
    """A route and a body with a few values replaced, removed, repeated or added."""
    path = draw(st.sampled_from(PATHS[:2]))
    body = copy.deepcopy(BODIES[path])
    for name in draw(
        st.lists(st.sampled_from([k for k in body if k not in ("messages", "prompt", "max_tokens")]), max_size=8)
    ):
        body.pop(name, None)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        if not body:
            break
        holder, key = draw(places(body))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "add"])):
            case "replace":
                holder[key] = draw(junk)
            case "remove":
                del holder[key]
            case "repeat" if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder[key]) for _ in range(draw(st.integers(1, 40))))
            case _ if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(junk)
    data = bytearray(json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(
            st.sampled_from([b"", b"\xff", b'"', b"\\", b"{", b"]", b",", b"\0", b"e9"])
        )
    return path, bytes(data)


token = st.text("abcXYZ-_", min_size=1, max_size=8).map(str.encode)
LINES = [
    *(b"Host: localhost", b"Host: 127.0.0.1:80", b"Host: evil.example.com", b"Host:", b"Host: [::1", b"Host: \xff"),
    *(b"Content-Length: 0", b"Content-Length: 2", b"Content-Length: 999999999999", b"Content-Length: -1"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked"),
    *(
        b"Content-Type: application/json",
        b"Content-Type: text/plain",
        b"Content-Encoding: gzip",
        b"Expect: 100-continue",
    ),
    *(b"Connection: close", b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", b"Origin: http://localhost"),
    *(
        b"Origin: null",
        b"Authorization: Bearer \xe9",
        b"X-Api-Key:",
        b"Sec-Fetch-Site: cross-site",
        b"Range: bytes=0-1",
    ),
    *(b" folded", b"No colon", b"Space : x", b": x", b"X: a\rb", b"X: a\0b", b"X: " + b"y" * 70_000),
]
header = st.one_of(st.sampled_from(LINES), st.builds(lambda a, b: a + b": " + b, token, st.binary(max_size=12)))
target = st.one_of(
    st.sampled_from([p.encode() for p in PATHS]),
    st.sampled_from([b"*", b"/", b"//", b"/%00%ff", b"/v1/models/%2e%2e", b"http://localhost/health", b"http://evil.com/health"]),
    st.sampled_from([b"localhost:80", b"", b"/" + b"a" * 70_000, b"/v1/models/" + b"%" * 300, b"http://[::1/health"]),
    st.binary(max_size=12),
)  # fmt: skip


@st.composite
def heads(draw):
    """Bytes that begin like requests, one or more in a row."""
    sent = b""
    for _ in range(draw(st.integers(1, 3))):
        method = draw(
            st.one_of(st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"CONNECT", b"PRI", b"get"]), token)
        )
        version = draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.x", b"http/1.1", b""]))
        lines = [method + b" " + draw(target) + b" " + version, *draw(st.lists(header, max_size=5))]
        if draw(st.integers(0, 4)):
            lines.insert(1, b"Host: localhost")
        end = draw(st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n"]))
        sent += end.join([*lines, b"", draw(st.sampled_from([b"", b"", b"{}", b"0\r\n\r\n"]))])
    return sent


@st.composite
def chunked(draw):
    """A body in chunks of which some are not what they say."""
    body, sent = json.dumps(BODIES[PATHS[0]] | {"stream": draw(st.booleans())}).encode(), b""
    while body:
        size = draw(st.integers(1, 200))
        piece, body = body[:size], body[size:]
        said = draw(
            st.sampled_from(
                [b"%x" % len(piece)] * 12 + [b"%X" % len(piece), b"000%x" % len(piece), b"zz", b"-1", b"", b"f" * 21]
            )
        )
        extension = draw(st.sampled_from([b""] * 8 + [b";a", b';a="\\"', b" ", b";" + b"a" * 70_000, b";\n"]))
        sent += said + extension + b"\r\n" + piece + draw(st.sampled_from([b"\r\n"] * 12 + [b"", b"\n", b"XX"]))
    trailers = draw(
        st.sampled_from(
            [b"", b"", b"A: b\r\n", b"Content-Length: 5\r\n", b" x\r\n", b"no colon\r\n", b"a: b\r\n" * 20_000]
        )
    )
    return sent + b"0\r\n" + trailers + draw(st.sampled_from([b"\r\n"] * 4 + [b"", b"\n"]))


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
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 1000
    assert capsys.readouterr().err == ""
    return [int(a[:3]) for a in answers]


def framed(path, body, how=b"Content-Length: %d\r\n"):
    head = (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        % path.encode()
    )
    return head + (how % len(body) if b"%" in how else how) + b"\r\n" + body


@fuzz(240)
@given(request=mutated())
def test_bodies(server, capsys, request):
    assert len(check(server, framed(*request), capsys)) == 1, "a whole request has an answer"


@fuzz(120)
@given(sent=heads())
def test_heads(server, capsys, sent):
    check(server, sent, capsys)


@fuzz(80)
@given(body=chunked())
def test_chunks(server, capsys, body):
    check(server, framed(PATHS[0], body, b"Transfer-Encoding: chunked\r\n"), capsys)


def test_the_whole_bodies_are_answered(server, capsys, monkeypatch):
    """What is mutated is right as it stands; and nothing of the other tests is left."""
    for name in ("HEAD_S", "BODY_S"):
        monkeypatch.setattr(f"ring_mlx.serve.wire.{name}", WALL_S)
    for path, body in BODIES.items():
        assert check(server, framed(path, json.dumps(body).encode()), capsys) == [200]
    assert [metric(server, name) for name in ("queue_length", "reading", "batch_size")] == [0, 0, 0]
    wait_until(lambda: not server.slots._taken)
