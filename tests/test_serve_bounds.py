"""What ``ring-mlx serve`` refuses before it renders or encodes it, and what it must not refuse."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from ring_mlx.engine.events import Sampling
from ring_mlx.errors import PromptError
from ring_mlx.serve import fields, generation_fields, large, protocol
from ring_mlx.serve.completions import parse_completion
from ring_mlx.serve.engine import PIECE_CHARS, Encoder
from ring_mlx.serve.failures import ApiError, GoneError
from ring_mlx.serve.fields import read_json, read_object
from ring_mlx.serve.large import LARGE_BYTES, LargeTurns
from ring_mlx.serve.protocol import ApiRequest, parse_chat
from ring_mlx.serve.server import MOST_BODY_BYTES
from tests.serving import CHAT, GOOD, TOOLS, send, user

MANY = fields.MOST_VALUES + 1
HUGE = {
    "elements": b"[" + b"1," * MANY + b"1]",
    "objects": b"[" + b"{}," * MANY + b"{}]",
    "keys": b"{" + b",".join(b'"%d":1' % i for i in range(MANY)) + b"}",
    "empty strings": b"[" + b'"",' * MANY + b'""]',
    "arrays in arrays": b"[" * MANY,
    "a long number": b'{"seed": ' + b"9" * 65 + b"}",
    "many long numbers": b"[" + (b"9" * 4000 + b",") * 1000 + b"1]",
    "strings before": b'{"a": "' + b"," * MANY + b'", "b": "\\\\\\"", "c": [' + b"1," * MANY + b"1]}",
    "an open string before": b'"' + b'\\"' * 500_000,
    "quotes": b'"' * 1_000_001 + b"," * MANY,
}


FOUND_OUT = ("a long number", "many long numbers", "an open string before", "quotes")


@pytest.mark.parametrize("name", HUGE)
def test_json_that_takes_long_is_not_parsed(name, monkeypatch):
    """Too many values are counted before; that it is no JSON, or that a number is too long, is found out at once."""
    parsed = []
    monkeypatch.setattr(json, "loads", lambda *a, loads=json.loads, **k: parsed.append(1) or loads(*a, **k))
    with pytest.raises(ApiError) as e:
        read_object(HUGE[name])
    assert (e.value.status, bool(parsed)) == ((400, True) if name in FOUND_OUT else (413, False))


def test_what_only_looks_like_much_is_read():
    text = "[{," * MANY + "9" * 100 + '"\\'
    assert read_json(json.dumps({"a": text, "b": [text[-3:]] * 1000, "c": 10**60, "d": 0.1}).encode())["a"] == text
    nested = b"[" * (fields.MOST_LEVELS + 1) + b"]" * (fields.MOST_LEVELS + 1)
    assert read_json(nested)
    with pytest.raises(ApiError, match="levels"):
        read_json(b"[" + nested + b"]")


def test_real_requests_are_read():
    """An agent's 2,000 messages and 100 tools, a text of 128k tokens as escapes, and as many ids."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x" * 80} for i in range(60)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(100)]
    call = [{"id": "c", "type": "function", "function": {"name": "f1", "arguments": '{"a": [1, 2]}'}}]
    turn = [
        {"role": "assistant", "tool_calls": call},
        {"role": "tool", "tool_call_id": "c", "content": '{"a": 1}' * 30},
    ]
    bodies = [
        {"messages": user("x", *turn * 1000), "tools": tools, "logit_bias": {str(i): -100 for i in range(5000)}},
        {"messages": user("文" * 131_072 * 2)},
    ]
    for body in bodies:
        data = json.dumps(body).encode()
        assert len(data) < MOST_BODY_BYTES
        asked = parse_chat(read_object(data), Sampling())
        assert (len(asked.prompt), len(asked.tools)) == (len(body["messages"]), len(body.get("tools", ())))
    ids = [150_000] * 131_072
    assert parse_completion(read_object(json.dumps({"prompt": ids}).encode()), Sampling()).prompt == ids


TOO_MANY = [
    {"messages": user("x") * (protocol.MOST_MESSAGES + 1)},
    {"tools": TOOLS * (protocol.MOST_TOOLS + 1)},
    {"stop": "x" * (generation_fields.MOST_STOP_CHARS + 1)},
    {"stop": ["a", "x" * (generation_fields.MOST_STOP_CHARS + 1)]},
    {"logit_bias": {str(i): 1 for i in range(generation_fields.MOST_BIASES + 1)}},
    {"chat_template_kwargs": {f"o{i}": 1 for i in range(generation_fields.MOST_OPTIONS + 1)}},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" + "1," * MANY + "1]"}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2049}] * 2},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [' + "1," * (MANY // 4) + "1]}"}}]}] * 5},
]  # fmt: skip


@pytest.mark.parametrize("change", TOO_MANY, ids=lambda c: next(iter(c)))
def test_too_many_of_a_kind(change):
    with pytest.raises(ApiError, match=r"more than|exceed") as e:
        parse_chat(GOOD | change, Sampling())
    assert e.value.status in (400, 413)
    name, value = next(iter(change.items()))
    if name in ("tools", "logit_bias", "chat_template_kwargs"):
        fewer = value[:-1] if isinstance(value, list) else dict(list(value.items())[:-1])
        parse_chat(GOOD | {name: fewer}, Sampling())


class Counted:
    """A tokenizer of words that counts what it is asked to encode."""

    bos_token, is_fast, has_chat_template, has_thinking = None, False, True, False
    special_tokens_map: ClassVar = {}
    chat_template = "{{ messages[-1].content }}"

    def __init__(self):
        self.encoded = 0

    def get_chat_template(self, *_):
        return self.chat_template

    def get_vocab(self):
        return {"x": 0, "lengthy": 1, "éé": 2}

    def encode(self, text, add_special_tokens=True):
        self.encoded += len(text)
        return [1] * len(text.split())


def stay():
    return False


def prompt_of(encoder, text, chat, gone=stay):
    return encoder.prompt(ApiRequest(user(text) if chat else text, is_text=not chat), gone)[0]


@pytest.mark.parametrize("chat", [True, False])
def test_text_of_more_bytes_than_any_tokens_have_is_not_encoded(chat):
    tokenizer = Counted()
    with pytest.raises(PromptError, match="at least 1001 tokens exceed the context of 1000"):
        prompt_of(Encoder(tokenizer, 1000), "lengthy" * 1000 + "x", chat)
    assert tokenizer.encoded == 0


@pytest.mark.parametrize("chat", [True, False])
def test_longer_text_is_counted_in_pieces_and_refused_early(chat):
    tokenizer = Counted()
    with pytest.raises(PromptError, match="exceed the context"):
        prompt_of(Encoder(tokenizer, 50_000), "x " * 170_000, chat)
    assert tokenizer.encoded < 50_000 * 2 * 5 // 4 + 2 * PIECE_CHARS
    assert len(prompt_of(Encoder(tokenizer, 50_000), "lengthy" * 7 * 7000, chat).ids) == 1, (
        "few tokens of many bytes fit"
    )


def test_a_client_that_leaves_stops_the_encoding():
    tokenizer = Counted()
    with pytest.raises(GoneError):
        prompt_of(Encoder(tokenizer, 100_000), "x " * 300_000, True, lambda: tokenizer.encoded > 3 * PIECE_CHARS)
    assert tokenizer.encoded <= 4 * PIECE_CHARS


def answered(text):
    return user("x", {"role": "assistant", "content": text})


TOO_LONG = [
    {"prompt": user("x" * 8000)},
    {"tools": [{"x": "x" * 8000}]},
    {"prompt": answered("x" * 8000)},
    {"prompt": answered("hm</think>" + "x" * 8000)},
]


@pytest.mark.parametrize("more", TOO_LONG)
def test_what_cannot_fit_is_not_rendered(more, monkeypatch):
    monkeypatch.setattr("ring_mlx.engine.branches.render_text", lambda *_: pytest.fail("it was rendered"))
    with pytest.raises(PromptError, match="exceed the context"):
        Encoder(Counted(), 1000).prompt(ApiRequest(**({"prompt": user("x")} | more)), stay)


def test_a_thought_that_the_template_may_drop_is_rendered():
    asked = ApiRequest(answered("x" * 8000 + "</think>4"))
    assert Encoder(Counted(), 1000).prompt(asked, stay)[0].text == "x"


def test_ids_beyond_the_context_are_counted_only():
    with pytest.raises(PromptError, match="exceed the context"):
        Encoder(Counted(), 10).prompt(ApiRequest([0] * 11, is_text=True), stay)


def test_large_requests_take_turns_and_small_ones_need_none():
    turns, order, left = LargeTurns(), [], threading.Event()

    def wait():
        try:
            with turns.turn(LARGE_BYTES + 1, left.is_set):
                order.append("second")
        except GoneError:
            order.append("gone")

    with turns.turn(LARGE_BYTES + 1, stay):
        threads = [threading.Thread(target=wait)]
        threads[0].start()
        with turns.turn(LARGE_BYTES, stay):
            order.append("small")
        left.set()
        threads[0].join(10)
        order.append("first")
        left.clear()
        threads.append(threading.Thread(target=wait))
        threads[1].start()
        time.sleep(0.1)
    threads[1].join(10)
    assert order == ["small", "gone", "first", "second"]


def test_after_a_large_request_others_get_the_processor(monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(large, "time", clock)
    turns, at = LargeTurns(), []
    for took in (0.05, 20.0, 0.05):
        with turns.turn(LARGE_BYTES + 1, stay):
            at.append(now[0])
            now[0] += took
        with turns.turn(LARGE_BYTES, stay):
            at.append(now[0])
    waits = [at[i + 1] - at[i] for i in (1, 3)]
    assert waits == pytest.approx([0.15, 0.3])
    with pytest.raises(GoneError), turns.turn(LARGE_BYTES + 1, lambda: True):
        pytest.fail("it did not leave")


def test_what_is_too_much_is_refused_while_a_short_request_is_answered(serve):
    """Over HTTP: none of them is rendered or encoded, whichever limit it meets."""
    server = serve(max_body_bytes=64 << 20)
    tokenizer = server.engine.encoder._tokenizer
    encoded = []
    real = type(tokenizer._tokenizer).__call__
    type(tokenizer._tokenizer).__call__, restore = (lambda s, t, **k: encoded.append(len(t)) or real(s, t, **k)), real
    try:
        for body in (
            {"messages": user("word " * 6_000_000)},
            {"messages": user("x") * 300_000},
            {"messages": user("x"), "logit_bias": {str(i): 1 for i in range(1_000_000)}},
            {"messages": user("x"), "stop": ["s"] * 300_000},
            {"messages": user("x"), "tools": TOOLS * 50_000},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 300_000}]},
        ):
            status, _, answer = send(server, "POST", CHAT, body)
            assert status in (400, 413), (status, answer)
        assert send(server, "POST", "/v1/completions", {"prompt": "word " * 6_000_000})[0] == 400
        assert send(server, "POST", "/v1/completions", {"prompt": [1] * 200_000})[0] == 400
        assert encoded == []
        assert send(server, "POST", CHAT, GOOD)[0] == 200
        assert len(encoded) == 1
    finally:
        type(tokenizer._tokenizer).__call__ = restore
