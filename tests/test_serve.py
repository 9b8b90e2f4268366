"""``ring-mlx serve`` from outside: the real client, several at once, clients that leave, bodies that are wrong."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from mlx_lm.sample_utils import make_logits_processors

from ring_mlx import demo_model_path, load, render_chat, stream_generate
from ring_mlx.cli import main
from ring_mlx.errors import OptionError
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.protocol import parse_chat
from ring_mlx.serve.server import Server
from ring_mlx.serve.settings import Settings
from ring_mlx.serve.stops import StopText
from ring_mlx.session_events import AnswerText, Sampling, ThinkingText
from ring_mlx.speech import Speech

GREEDY = {"model": "toy", "temperature": 0, "max_tokens": 80}
SUMS = ("What is 27 + 35?", "What is 8 + 9?", "Which is larger, 41 or 17?", "What is 112 + 305?")
PLAIN = "<role>HUMAN</role>What is 3 + 4?<|role_end|><role>ASSISTANT</role><think>\n"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def user(text, *before):
    return [*before, {"role": "user", "content": text}]


@pytest.fixture
def serve(tmp_path):
    """Starts servers on free ports."""
    made = []

    def start(api_key=None, max_body_bytes=100_000, **settings):
        options = {"model": demo_model_path(), "name": "toy", "store": tmp_path / "store", "read_ahead": False}
        server = Server(Settings(**(options | settings)), port=0, api_key=api_key, max_body_bytes=max_body_bytes)
        server.start()
        made.append(server)
        assert server.engine.wait_until_loaded(30)
        return server

    yield start
    for server in made:
        assert server.close()


@pytest.fixture
def server(serve):
    return serve()


def client_of(server, key="any"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


@pytest.fixture(scope="module")
def toy():
    return load(demo_model_path())


def alone(toy, text, **options):
    """Thought and answer of `ring_mlx.stream_generate` for a chat of one message."""
    model, tokenizer = toy
    speech = Speech()
    for e in stream_generate(model, tokenizer, render_chat(tokenizer, user(text)), max_tokens=80, **options):
        list(speech.add(e))
    message = speech.message()
    return message.get("reasoning_content"), message["content"]


def endless(toy):
    """A body whose answer never ends by itself."""
    banned = {str(i): -100 for i in toy[1].eos_token_ids}
    return {"messages": user("What is 1 + 1?"), "max_tokens": 4000, "logit_bias": banned, "stream": True}


def send(server, method, path, body=b"", **headers):
    """The status, headers and JSON object of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body or None, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, dict(answer.headers), json.loads(text) if text[:1] == b"{" else text.decode()
    finally:
        connection.close()


def start_stream(server, body):
    """A socket whose stream has begun."""
    data = json.dumps(body).encode()
    s = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    s.sendall(head.encode() + b"\r\n\r\n" + data)
    return s


def metric(server, name):
    text = send(server, "GET", "/metrics")[2]
    found = re.search(rf"^ring_mlx_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


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

        monkeypatch.setattr("ring_mlx.serve.row.thought_closer", closer)

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
    answer = client.chat.completions.create(**(request | {"max_completion_tokens": 5}))
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


def test_penalties_see_the_prompt_as_those_of_generate_do(client, toy):
    model, tokenizer = toy
    processors = make_logits_processors(repetition_penalty=20.0)
    expected = "".join(
        e.text for e in stream_generate(model, tokenizer, PLAIN, max_tokens=20, logits_processors=processors)
    )
    given = {"repetition_penalty": 20.0}
    answer = client.completions.create(prompt=PLAIN, extra_body=given, **(GREEDY | {"max_tokens": 20}))
    assert answer.choices[0].text == expected
    assert client.completions.create(prompt=PLAIN, **(GREEDY | {"max_tokens": 20})).choices[0].text != expected


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
    with pytest.raises(openai.UnprocessableEntityError, match="n above 1"):
        client.chat.completions.create(messages=user("x"), n=2, **GREEDY)


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


# Clients that leave, and too many of them


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(serve, toy, stream):
    server = serve(max_batch=1)
    s = start_stream(server, endless(toy) | {"stream": stream})
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    s.close()
    left_at = metric(server, "generated_tokens_total")
    wait_until(lambda: metric(server, "batch_size") == 0, 2)
    assert metric(server, 'requests_finished_total{reason="cancelled"}') == 1
    assert metric(server, "generated_tokens_total") - left_at < 40
    with client_of(server) as client:
        assert client.chat.completions.create(messages=user(SUMS[1]), **GREEDY).choices[0].message.content


def test_a_cancelled_job_gets_at_most_one_token_more(serve, toy):
    engine = serve().engine
    body = endless(toy)
    jobs = [engine.prepare(parse_chat(body, Sampling(temp=0))) for _ in range(2)]
    for job in jobs:
        engine.submit(job)
    said = [0, 0]
    while said[0] < 8:
        for n, job in enumerate(jobs):
            while not job.events.empty():
                said[n] += isinstance(job.events.get(), (ThinkingText, AnswerText))
        time.sleep(0.001)
    engine.cancel(jobs[0])
    wait_until(lambda: engine.gauges()["batch_size"] == 1)
    assert jobs[0].events.qsize() <= 2
    wait_until(lambda: jobs[1].events.qsize() > 5)
    engine.cancel(jobs[1])
    wait_until(lambda: engine.gauges()["batch_size"] == 0)


def test_a_long_prompt_does_not_stop_the_others(serve, toy):
    server = serve(prefill_step_tokens=32)
    s = start_stream(server, endless(toy))
    wait_until(lambda: metric(server, "generated_tokens_total") > 3)
    long = user("3 + 4, " * 150)
    steps = len(render_chat(toy[1], long)) // 32
    late = start_stream(server, {"messages": long, "stream": True})
    wait_until(lambda: metric(server, "reading") == 1)
    before = metric(server, "generated_tokens_total")
    wait_until(lambda: metric(server, "batch_size") == 2, 30)
    assert metric(server, "generated_tokens_total") - before > 2 * steps, "reading got more than its half of the time"
    s.close()
    late.close()


def test_a_client_that_leaves_while_it_waits_or_is_read(serve, toy):
    server = serve(max_batch=1, prefill_step_tokens=8)
    long = {"messages": user("3 + 4, " * 900), "stream": True}
    reading, waiting = start_stream(server, long), start_stream(server, long)
    wait_until(lambda: metric(server, "reading") == 1 and metric(server, "queue_length") == 1)
    waiting.close()
    wait_until(lambda: metric(server, "queue_length") == 0, 3)
    reading.close()
    wait_until(lambda: metric(server, "reading") == 0, 3)
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
    monkeypatch.setattr("ring_mlx.serve.work.memory.budget_bytes", lambda: 1)
    sockets = [start_stream(server, endless(toy)) for _ in range(2)]
    wait_until(lambda: metric(server, "batch_size") == 1 and metric(server, "queue_length") == 1)
    sockets[0].close()
    wait_until(lambda: metric(server, "batch_size") == 1 and metric(server, "queue_length") == 0)
    sockets[1].close()


def test_a_failure_in_the_model_is_told_and_forgotten(serve, monkeypatch, toy, capfd):
    server = serve()
    model = server.engine._model
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


def _breaking(call, broken):
    def called(*args, **kwargs):
        if broken.is_set():
            raise ValueError("made to fail")
        return call(*args, **kwargs)

    return called


# What is wrong

CHAT, GOOD = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
WRONG = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"[" * 50_000, 400),
    *((b'{"top_p": ' + b"[" * n + b"]" * n + b"}", 400) for n in (60, 70, 900, 960, 990)),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
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
        {"n": 2}, {"response_format": {"type": "json_object"}}, {"tool_choice": "required"},
        {"tool_choice": {"type": "function"}}, {"functions": [{}]},
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
    assert send(server, "POST", "/v1/completions", {"prompt": ["a", "b"]})[0] == 422
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
        (b"GET / HTTP/9.9\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", b"411"),
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
        s.sendall(b"GET /health HTTP/1.1\r\nContent-Length: 28\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n  ")
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


# Parts and the command


def test_too_many_connections(tmp_path):
    server = Server(Settings(demo_model_path(), "toy", store=False), port=0, max_connections=1)
    server.start()
    with socket.create_connection(("127.0.0.1", server.server_port)):
        time.sleep(0.2)
        assert send(server, "GET", "/health")[0] == 503
    assert server.close()


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
    assert (asked.sampling.temp, asked.sampling.seed) == (0.25, (1 << 63) - 1)
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
