"""What the tests of `ring-mlx serve` send to a server and read off it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time

import openai

from ring_mlx.engine.events import End
from ring_mlx.errors import RingError
from ring_mlx.serve.protocol import parse_chat

GREEDY = {"model": "toy", "temperature": 0, "max_tokens": 80}
SUMS = ("What is 27 + 35?", "What is 8 + 9?", "Which is larger, 41 or 17?", "What is 112 + 305?")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
PLAIN = "<role>HUMAN</role>What is 3 + 4?<|role_end|><role>ASSISTANT</role><think>\n"
CHAT, GOOD = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def user(text, *before):
    return [*before, {"role": "user", "content": text}]


def ask(engine, text, max_tokens=4):
    """A request that an engine has been given, without a connection."""
    body = {"messages": user(text), "max_tokens": max_tokens, "temperature": 0}
    job = engine.prepare(parse_chat(body, engine.settings.sampling))
    engine.submit(job)
    return job


def answer_of(job, seconds=60):
    """The events of a job up to its last."""
    events = [job.events.get(timeout=seconds)]
    while not isinstance(events[-1], (End, RingError)):
        events.append(job.events.get(timeout=seconds))
    return events


def client_of(server, key="any"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key=key, max_retries=0, timeout=30)


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
        return (
            answer.status,
            dict(answer.headers),
            json.loads(text)
            if text[:1] == b"{" and answer.headers["Content-Type"] == "application/json"
            else text.decode(),
        )
    finally:
        connection.close()


def start_stream(server, body):
    """A socket whose stream has begun."""
    data = json.dumps(body).encode()
    s = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    s.sendall(head.encode() + b"\r\n\r\n" + data)
    return s


def metric(server, name):
    text = send(server, "GET", "/metrics")[2]
    found = re.search(rf"^ring_mlx_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
