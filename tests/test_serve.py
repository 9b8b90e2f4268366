"""``ring-mlx serve`` from outside: the real client, several at once, and the command."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from mlx_lm.sample_utils import make_logits_processors

from ring_mlx import render_chat, stream_generate
from ring_mlx.cli import main
from ring_mlx.engine.events import Sampling
from ring_mlx.errors import OptionError
from ring_mlx.generation.message import MessageBuilder, StopText
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.serve.server import Server
from tests.serving import (
    CHAT,
    GOOD,
    GREEDY,
    PLAIN,
    SUMS,
    TOOLS,
    client_of,
    metric,
    send,
    user,
    wait_until,
)


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


def alone(toy, text, **options):
    """Thought and answer of `ring_mlx.stream_generate` for a chat of one message."""
    model, tokenizer = toy
    builder = MessageBuilder()
    for e in stream_generate(model, tokenizer, render_chat(tokenizer, user(text)), max_tokens=80, **options):
        list(builder.add(e))
    message = builder.message()
    return message.get("reasoning_content"), message["content"]


# The real client


def test_chat(client, toy):
    answer = client.chat.completions.create(messages=user(SUMS[0]), **GREEDY)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == alone(toy, SUMS[0])
    assert message.reasoning_content
    assert "think" not in message.content
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "toy", "stop")
    usage = answer.usage
    assert usage.prompt_tokens == len(render_chat(toy[1], user(SUMS[0])))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_stream_is_the_whole_in_pieces(client, toy):
    request = {**GREEDY, "messages": user(SUMS[0]), "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = client.chat.completions.create(**request)
    deltas = [p.choices[0].delta for p in pieces]
    assert deltas[0].role == "assistant"
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas).strip("\n")
    assert (thought, "".join(d.content or "" for d in deltas)) == alone(toy, SUMS[0])
    assert [p.choices[0].finish_reason for p in pieces[-2:]] == [None, "stop"]
    assert len({p.id for p in pieces}) == 1
    assert (last.choices, last.usage.prompt_tokens) == ([], len(render_chat(toy[1], user(SUMS[0]))))


@pytest.fixture
def script(monkeypatch, toy):
    """Makes the model say a given text."""

    def say(text):
        ids = [*toy[1].encode(text, add_special_tokens=False), next(iter(toy[1].eos_token_ids))]

        def closer(*_):
            left = iter(ids)
            return lambda: next(left)

        monkeypatch.setattr("ring_mlx.engine.row.thought_closer", closer)

    return say


def test_tools(client, script):
    script(
        'look it up\n</think>\n\nOne moment.\n<tool_call>\n{"name": "weather", "arguments": {"of": "Rome"}}\n</tool_call>'
    )
    choice = client.chat.completions.create(messages=user("Weather?"), tools=TOOLS, **GREEDY).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name, json.loads(call.function.arguments)) == (
        "tool_calls",
        "weather",
        {"of": "Rome"},
    )
    assert choice.message.content.strip() == "One moment."
    stream = client.chat.completions.create(messages=user("Weather?"), tools=TOOLS, stream=True, **GREEDY)
    deltas = [p.choices[0].delta for p in stream]
    (streamed,) = [c for d in deltas for c in d.tool_calls or []]
    assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
    talk = [*user("Weather?"), choice.message.model_dump(exclude_none=True)]
    talk.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    script("so\n</think>\n\nSunny.")
    assert client.chat.completions.create(messages=talk, tools=TOOLS, **GREEDY).choices[0].message.content == "Sunny."


def test_completions(client, toy):
    model, tokenizer = toy
    answer = client.completions.create(prompt=PLAIN, **GREEDY)
    expected = "".join(e.text for e in stream_generate(model, tokenizer, PLAIN, max_tokens=80))
    assert answer.choices[0].text == expected
    assert "</think>" in expected
    streamed = client.completions.create(prompt=tokenizer.encode(PLAIN), stream=True, **GREEDY)
    assert "".join(p.choices[0].text for p in streamed) == expected


def test_stop_and_length(client, toy):
    whole = alone(toy, SUMS[0])[1]
    request = {"messages": user(SUMS[0]), **GREEDY}
    choice = client.chat.completions.create(stop=["nowhere", whole[4:9]], **request).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(whole[4:9])], "stop")
    answer = client.chat.completions.create(**(request | {"max_tokens": None, "max_completion_tokens": 5}))
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert not hasattr(
        client.chat.completions.create(extra_body=off, **request).choices[0].message, "reasoning_content"
    )
    short = client.chat.completions.create(extra_body={"thinking_budget": 3}, **request)
    assert len(short.choices[0].message.reasoning_content) < len(alone(toy, SUMS[0])[0])


def test_logprobs(client):
    request = {"messages": user(SUMS[0]), "logprobs": True, "top_logprobs": 2, **GREEDY}
    choice = client.chat.completions.create(**request).choices[0]
    tokens = choice.logprobs.content
    assert "".join(t.token for t in tokens).strip() == choice.message.content
    assert all(t.logprob <= 0 and t.top_logprobs[0].token == t.token and len(t.top_logprobs) == 2 for t in tokens)
    stream = client.chat.completions.create(stream=True, **request)
    told = [t.token for p in stream if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert told == [t.token for t in tokens]


@pytest.mark.parametrize("looked_at", [20, 100])
def test_penalties_see_the_prompt_as_those_of_generate_do(client, toy, looked_at):
    (model, tokenizer), prompt = toy, PLAIN * 12
    processors = make_logits_processors(repetition_penalty=20.0, repetition_context_size=looked_at)
    expected = "".join(
        e.text for e in stream_generate(model, tokenizer, prompt, max_tokens=20, logits_processors=processors)
    )
    given = {"repetition_penalty": 20.0, "repetition_context_size": looked_at}
    answer = client.completions.create(prompt=prompt, extra_body=given, **(GREEDY | {"max_tokens": 20}))
    assert answer.choices[0].text == expected
    other = given | {"repetition_context_size": 120 - looked_at}
    answer = client.completions.create(prompt=prompt, extra_body=other, **(GREEDY | {"max_tokens": 20}))
    assert answer.choices[0].text != expected


def test_a_seed_repeats_an_answer_whatever_else_runs(client):
    request = {"messages": user("Tell me a word."), "model": "toy", "temperature": 2, "max_tokens": 12}
    with ThreadPoolExecutor(4) as pool:
        first = client.chat.completions.create(seed=7, **request).choices[0].message
        made = [pool.submit(client.chat.completions.create, seed=seed, **request) for seed in (7, 8, 9, 7)]
        found = [m.result().choices[0].message for m in made]
    assert [m == first for m in found] == [True, False, False, True]


def test_models_and_errors_of_the_client(client):
    assert [m.id for m in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "ring-mlx"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(**(GREEDY | {"model": "gpt", "messages": user("x")}))
    with pytest.raises(openai.BadRequestError, match="exceed the context") as e:
        client.chat.completions.create(messages=user("1 " * 9000), **GREEDY)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="functions is not supported"):
        client.chat.completions.create(messages=user("x"), functions=[{"name": "f"}], **GREEDY)


def test_api_key(serve):
    server = serve(api_key="schlüssel")
    with client_of(server, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    status, headers, body = send(server, "GET", "/metrics")
    assert (status, headers["WWW-Authenticate"], body["error"]["code"]) == (401, "Bearer", "invalid_api_key")
    assert send(server, "POST", "/v1/chat/completions", b"{}", Authorization="Basic schlüssel")[0] == 401
    assert send(server, "GET", "/health")[0] == 200
    bearer = "Bearer schlüssel".encode().decode("latin-1")
    assert send(server, "GET", "/v1/models", Authorization=bearer)[0] == 200


# Several at once, and what they share


def test_four_at_once_say_what_each_says_alone(client, server, toy):
    expected = [alone(toy, text) for text in SUMS]
    sizes = []
    with ThreadPoolExecutor(len(SUMS)) as pool:
        made = [pool.submit(client.chat.completions.create, messages=user(t), **GREEDY) for t in SUMS]
        while not all(m.done() for m in made):
            sizes.append(server.engine.gauges()["batch_size"])
            time.sleep(0.01)
        found = [m.result().choices[0].message for m in made]
    assert [(m.reasoning_content, m.content) for m in found] == expected
    assert max(sizes) > 1, "they never ran together"


def test_a_shared_prefix_is_read_once_even_after_a_restart(serve, toy):
    system = {"role": "system", "content": "You answer sums. " * 20}
    count = len(render_chat(toy[1], user("", system))) - 4
    first = serve()
    with client_of(first) as client:
        usages = [client.chat.completions.create(messages=user(t, system), **GREEDY).usage for t in SUMS[:2]]
    assert usages[0].prompt_tokens_details.cached_tokens == 0
    assert count - 8 < usages[1].prompt_tokens_details.cached_tokens <= count
    assert metric(first, "cached_tokens_total") == usages[1].prompt_tokens_details.cached_tokens
    assert first.close()
    with client_of(serve()) as client:
        again = client.chat.completions.create(messages=user(SUMS[2], system), **GREEDY).usage
    assert again.prompt_tokens_details.cached_tokens == usages[1].prompt_tokens_details.cached_tokens


def test_the_next_turn_reads_only_what_is_new(serve, toy):
    server = serve(read_ahead=True)
    with client_of(server) as client:
        talk = user(SUMS[0])
        message = client.chat.completions.create(messages=talk, **GREEDY).choices[0].message
        talk = user(SUMS[1], *talk, {"role": "assistant", "content": message.content})
        wait_until(lambda: server.engine.gauges()["batch_size"] == 0)
        time.sleep(0.3)
        answer = client.chat.completions.create(messages=talk, **GREEDY)
        new = answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens
        assert new <= len(toy[1].encode(SUMS[1])) + 8
        again = client.chat.completions.create(messages=talk, **GREEDY)
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        assert again.choices[0].message == answer.choices[0].message


# Parts and the command


def test_a_model_that_cannot_be_loaded(tmp_path):
    server = Server(Settings(tmp_path / "none", "none", store=False), port=0)
    server.start()
    with pytest.raises(Exception, match="none"):
        server.engine.wait_until_loaded(10)
    assert send(server, "GET", "/health")[::2] == (503, {"status": "failed", "model": "none"})
    assert send(server, "POST", CHAT, GOOD)[0] == 503
    assert server.close()


def test_the_command_says_in_one_line_why_it_cannot(server, tmp_path, capsys):
    for args in (
        ["--port", "0", "--model", str(tmp_path / "none")],
        ["--port", str(server.server_port)],
        ["--api-key", ""],
    ):
        assert main(["serve", *args, "--no-store"]) == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if "note:" not in line]) == 1


def test_an_address_that_is_taken(server):
    with pytest.raises(OptionError, match="cannot be listened on"):
        Server(server.engine.settings, port=server.server_port)


def test_stop_sequences_in_pieces():
    text = "one two three"
    for cut in range(1, 6):
        stops = StopText(["two t", "xx"])
        said = "".join(stops.feed(text[i : i + cut]) for i in range(0, len(text), cut)) + stops.flush()
        assert (said, stops.hit) == ("one ", True)
    stops = StopText(["threes"])
    assert stops.feed(text) + stops.flush() == text


def test_messages_are_put_as_templates_want_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "t"},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ],
        "seed": -1,
    }
    asked = parse_chat(body, Sampling(temp=0.25))
    inner = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "c"}
    assert asked.prompt == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [inner]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
    ]
    assert (asked.sampling.temp, asked.sampling.seed) == (0.25, -1)
    with pytest.raises(ApiError, match="tool_choice"):
        parse_chat({**body, "tool_choice": "required"}, Sampling())


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "ring_mlx", "serve", "--port", "0", "--cache-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1 loads ring-nano", process.stdout.readline())[1])
        assert "ready" in process.stdout.readline()
        with socket.create_connection(("127.0.0.1", port)):
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
