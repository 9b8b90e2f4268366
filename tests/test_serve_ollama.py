"""Ollama's routes, with its official client where that is installed, and what they make of a request."""

from __future__ import annotations

import json

import pytest

from ring_mlx.engine.events import Sampling
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.ollama import parse_ollama
from ring_mlx.serve.protocol import parse_chat
from tests.scripted import said, script
from tests.serving import CHAT, SUMS, TOOLS, send, user

ROUTE = "/api/chat"
GREEDY = {"options": {"temperature": 0, "num_predict": 80}, "messages": user(SUMS[0])}


def parsed(**body):
    return parse_ollama({"messages": user("x")} | body, Sampling())


def test_a_request_is_that_of_the_chat_route():
    options = {"temperature": 0.5, "top_k": 4, "repeat_penalty": 1.1, "repeat_last_n": 64, "stop": ["a"], "seed": 3}
    mine = parsed(options={**options, "num_predict": 7}, think=False, stream=False, tools=TOOLS, keep_alive="5m")
    other = parse_chat(
        {"messages": user("x"), "max_tokens": 7, "enable_thinking": False, "tools": TOOLS} | options, Sampling()
    )
    names = (
        "prompt",
        "sampling",
        "max_tokens",
        "stop",
        "template_options",
        "thinking_budget",
        "tools",
        "stream",
        "left_out",
    )
    assert [getattr(mine, name) for name in names] == [getattr(other, name) for name in names]
    assert parsed().stream
    assert parsed(options={"num_predict": -2}).max_tokens == -1
    assert parsed(think="high", options={"num_ctx": 8}).left_out == ("num_ctx", "reasoning_effort")
    assert parsed(n=2).left_out == parsed(options={"n": 2}).left_out == ("n",)
    assert (parsed(n=2).n, parsed(n=1).left_out) == (1, ())
    assert parsed(format="json").form == parse_chat({"messages": user("x"), "response_format": {"type": "json_object"}}, Sampling()).form  # fmt: skip
    assert parsed(format={"type": "object"}).form is not None
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    talk = [*user("x"), {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_name": "f", "content": "2"}]  # fmt: skip
    assert parsed(messages=talk).prompt[1:] == [
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call | {"type": "function"}]},
        {"role": "tool", "content": "2", "name": "f"},
    ]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 422),
        ({"messages": []}, 400),
        ({"messages": ["x"]}, 400),
        ({"messages": "x"}, 400),
        ({"options": []}, 400),
        ({"options": {"num_predict": -3}}, 400),
        ({"options": {"num_predict": 0}}, 400),
        ({"options": {"temperature": "hot"}}, 400),
        ({"think": 1}, 400),
        ({"stream": "no"}, 400),
        ({"format": 3}, 400),
        ({"format": "text"}, 400),
    ],
)
def test_what_is_wrong(change, status):
    with pytest.raises(ApiError) as e:
        parsed(**change)
    assert e.value.status == status


def test_lines_are_the_whole_in_pieces(server):
    status, headers, text = send(server, "POST", ROUTE, GREEDY)
    assert (status, headers["Content-Type"]) == (200, "application/x-ndjson")
    *pieces, last = map(json.loads, text.splitlines())
    whole = send(server, "POST", ROUTE, GREEDY | {"stream": False})[2]
    expected = send(server, "POST", CHAT, {"messages": user(SUMS[0]), "temperature": 0, "max_tokens": 80})[2]
    message = expected["choices"][0]["message"]
    assert (whole["message"]["content"], whole["message"]["thinking"].strip()) == (
        message["content"], message["reasoning_content"].strip())  # fmt: skip
    assert "".join(p["message"]["content"] for p in pieces) == whole["message"]["content"]
    assert "".join(p["message"].get("thinking", "") for p in pieces) == whole["message"]["thinking"]
    for answer in (last, whole):
        assert (answer["done"], answer["done_reason"], answer["model"]) == (True, "stop", "toy")
        assert answer["eval_count"] == expected["usage"]["completion_tokens"]
        assert answer["prompt_eval_count"] == expected["usage"]["prompt_tokens"]
        assert answer["total_duration"] >= answer["eval_duration"] > 0
    assert not any(p["done"] for p in pieces)


def test_log_probabilities_are_those_of_the_chat_route(server):
    asked = {"messages": user(SUMS[0]), "logprobs": True, "top_logprobs": 2}
    expected = send(server, "POST", CHAT, asked | {"temperature": 0, "max_tokens": 80})[2]["choices"][0]["logprobs"]
    whole = send(server, "POST", ROUTE, GREEDY | asked | {"stream": False})[2]
    pieces = map(json.loads, send(server, "POST", ROUTE, GREEDY | asked)[2].splitlines())
    streamed = [t for p in pieces for t in p.get("logprobs", ())]
    for found in (whole["logprobs"], streamed):
        assert [t["token"] for t in found] == [t["token"] for t in expected["content"]]
        assert [t["logprob"] for t in found] == pytest.approx([t["logprob"] for t in expected["content"]], abs=1e-4)
        assert all(len(t["top_logprobs"]) == 2 for t in found)


def test_models_and_errors(server):
    (tag,) = send(server, "GET", "/api/tags")[2]["models"]
    assert (tag["name"], tag["size"] > 0, tag["details"]["format"]) == ("toy", True, "mlx")
    assert "8 bits" in tag["details"]["quantization_level"]
    shown = send(server, "POST", "/api/show", {"model": tag["name"]})[2]
    assert shown["model_info"]["ring-linear.context_length"] == server.models.first.context_tokens
    assert "tools" in shown["capabilities"]
    for path, body in (("/api/show", {"model": "other"}), (ROUTE, GREEDY | {"model": "other"})):
        status, _, answer = send(server, "POST", path, body)
        assert (status, list(answer)) == (404, ["error"])
        assert "no model 'other'" in answer["error"]
    assert send(server, "POST", "/api/show", b"[]")[0] == 400


def test_the_official_client(server, monkeypatch):
    ollama = pytest.importorskip("ollama")
    with ollama.Client(host=f"http://127.0.0.1:{server.server_port}") as client:
        check_client(client, ollama.ResponseError, lambda text: script(monkeypatch, lambda request: text))


def check_client(client, error, say):
    assert [m.model for m in client.list().models] == ["toy"]
    assert client.show("toy").modelinfo["general.architecture"] == "ring-linear"
    answer = client.chat("toy", user(SUMS[0]), options={"temperature": 0})
    assert answer.message.content == "The sum is 62."
    assert answer.message.thinking
    pieces = list(client.chat("toy", user(SUMS[0]), options={"temperature": 0}, stream=True))
    assert "".join(p.message.content for p in pieces) == answer.message.content
    assert client.chat("toy", user(SUMS[0]), think=False).message.thinking is None
    with pytest.raises(error, match="no model"):
        client.chat("other", user("x"))
    say(said("I look.", ("weather", '{"of": "Rome"}')))
    (call,) = client.chat("toy", user("Weather?"), tools=TOOLS).message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"of": "Rome"})
