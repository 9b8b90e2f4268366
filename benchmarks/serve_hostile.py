"""``python -m benchmarks.serve_hostile``: how soon ``ring-mlx serve`` refuses what is too much, and what others notice.

For each kind of body: seconds from its last byte to the answer, and how long a short request takes that is sent together
with it, against how long it takes alone. Alone and beside take turns, so that what else the machine does meets both. Exits with 1 where a refusal takes over 1 s or a short request over twice its time alone (medians).
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import arguments, report
from benchmarks.serve_load import served

CHAT = "/v1/chat/completions"
SHORT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0, "max_tokens": 16}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def chat(content: Any, **more: Any) -> bytes:
    """A request's body."""
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()


def messages(count: int) -> bytes:
    """A conversation of short messages."""
    return json.dumps({"messages": [{"role": "user", "content": "x"}] * count}).encode()


KINDS: dict[str, Callable[[], bytes]] = {
    "30 MB of text": lambda: chat("word " * 6_000_000),
    "7.5 MB of text": lambda: chat("word " * 1_500_000),
    "3 MB of text": lambda: chat("word " * 600_000),
    "60 KB of text": lambda: chat("word " * 12_000),
    "7 MB of escapes": lambda: chat("文" * 1_200_000),
    "300,000 messages": lambda: messages(300_000),
    "40,000 messages": lambda: messages(40_000),
    "1,000,000 biases": lambda: chat("x", logit_bias={str(i): 1 for i in range(1_000_000)}),
    "100,000 biases": lambda: chat("x", logit_bias={str(i): 1 for i in range(100_000)}),
    "120,000 stops": lambda: chat("x", stop=["s"] * 120_000),
    "20,000 tools": lambda: chat("x", tools=[TOOL] * 20_000),
    "a tool of 250,000 values": lambda: chat(
        "x", tools=[{**TOOL, "function": {"name": "f", "parameters": [{}] * 125_000}}]
    ),
    "8 MB of brackets": lambda: b"[" * 8_000_000,
    "8 MB of digits": lambda: b'{"seed": ' + b"9" * 8_000_000 + b"}",
}


def ask(port: int, body: bytes, chunked: bool = False) -> tuple[int, float]:
    """Status, and seconds from the last byte to the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        connection.endheaders()
        for at in range(0, len(body), 1 << 20):
            piece = body[at : at + (1 << 20)]
            connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            connection.send(b"0\r\n\r\n")
        sent = time.perf_counter()
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.perf_counter() - sent
    finally:
        connection.close()


def shorts(port: int, count: int) -> Iterator[float]:
    """Seconds of short requests, one after the other."""
    for _ in range(count):
        status, seconds = ask(port, json.dumps(SHORT).encode())
        assert status == 200, status
        yield seconds


def rows(args: argparse.Namespace, port: int) -> Iterator[dict[str, Any]]:
    """One for each kind of body."""
    list(shorts(port, 5))
    for name, make in KINDS.items():
        if args.only not in name:
            continue
        body, refusals = make(), list[tuple[int, float]]()
        alone, beside = list[float](), list[float]()
        for n in range(args.shorts):
            alone += shorts(port, 1)
            sender = threading.Thread(
                target=lambda n=n, body=body, seen=refusals: seen.append(ask(port, body, n % 2 == 1))
            )
            sender.start()
            beside += shorts(port, 1)
            sender.join()
        row = {"kind": f"{name:25}", "MB": len(body) / 1e6, "status": "/".join(sorted({str(s) for s, _ in refusals}))}
        row |= {"refused in s": [s for _, s in refusals], "short alone s": alone, "short beside s": beside}
        yield row | {"times": statistics.median(beside) / statistics.median(alone)}


def main() -> int:
    """Measure, print, and return 1 where a promise is not kept."""
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (the packaged toy)")
    parser.add_argument("--shorts", type=int, default=20, help="short requests alone, and as many beside")
    parser.add_argument("--max-body", default="8MB", help="of the server; 64MB lets all be parsed")
    parser.add_argument("--only", default="", help="kinds that contain this")
    args = parser.parse_args()
    args.max_batch, args.max_queue, args.cache_memory = 8, 64, "32MB"
    with served(args, ["--max-body", args.max_body]) as (_, port):
        found = report(args, rows(args, port))
    kept = all(statistics.median(r["refused in s"]) < 1 and r["times"] < 2 and "200" not in r["status"] for r in found)
    print("kept" if kept else "NOT KEPT")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
