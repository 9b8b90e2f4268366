"""``python -m benchmarks.serve_load``: ``ring-mlx serve`` under many clients, some of which leave in mid-stream.

A server process of its own; each client asks one request after the other, prompts and answers of mixed lengths, and
every fourth request is left after a few pieces. Told at the end: that every request that stayed got the answer that it
gets alone (greedy), that the server counts every request as answered or cancelled and holds none, how its memory went,
and how long answers took. ``--model`` takes any checkpoint, by default the packaged toy.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import arguments, report, slow_end

FILLER = "The ship left the quiet harbour at dawn and came back at night. "


@dataclass
class Seen:
    """What all clients have seen."""

    answered: int = 0
    left: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths: prompts of about 20 to 900 tokens, answers of 4 to 48."""
    made = []
    for n in range(count):
        text = FILLER * (0, 0, 4, 12, 40)[n % 5] + f"What is {7 * n + 3} + {5 * n + 8}?"
        made.append({"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 4 + 11 * (n % 5)})
    return made


def ask(
    port: int, body: dict[str, Any], leave_after: int | None = None, key: str = "none"
) -> tuple[int, str, float, int]:
    """Status, text (thought and answer), seconds to the first piece, and completion tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    try:
        more = {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json", "X-Api-Key": key}
        connection.request("POST", "/v1/chat/completions", json.dumps(body | more), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            answer.read()
            return answer.status, "", 0.0, 0
        text, first, tokens, pieces = "", 0.0, 0, 0
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                return 500, json.dumps(piece), 0.0, 0
            first = first or time.perf_counter() - started
            for choice in piece["choices"]:
                text += choice["delta"].get("reasoning_content") or choice["delta"].get("content") or ""
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
            pieces += 1
            if pieces == leave_after:
                return 0, text, first, 0
        return 200, text, first, tokens
    finally:
        connection.close()


def client(number: int, port: int, requests: list[dict[str, Any]], expected: list[str], each: int, seen: Seen) -> None:
    """Ask ``each`` requests; refused ones are asked again."""
    chance = random.Random(number)
    for n in range(each):
        at = chance.randrange(len(requests))
        leave = chance.randrange(1, 6) if (number + n) % 4 == 0 else None
        started = time.perf_counter()
        while (found := ask(port, requests[at], leave))[0] == 503:
            with seen.lock:
                seen.refused += 1
            time.sleep(0.5 + chance.random())
        status, text, first, tokens = found
        with seen.lock:
            if status == 200:
                seen.answered += 1
                seen.tokens += tokens
                seen.first_s.append(first)
                seen.whole_s.append(time.perf_counter() - started)
            seen.left += status == 0
            if status not in (0, 200) or (status == 200 and text != expected[at]):
                seen.wrong.append(f"request {at}: status {status}, {text!r} instead of {expected[at]!r}")


def metric(port: int, name: str) -> float:
    """One number of /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    found = re.search(rf"^ring_mlx_{re.escape(name)} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    connection.close()
    return float(found[1]) if found else 0.0


def resident_mb(pid: int) -> float:
    """Memory of a process, in MB."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)) / 1e3


@contextmanager
def served(args: argparse.Namespace, more: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Process number and port of a server, once the model is loaded; it ends with the context."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ring_mlx", "serve", "--port", "0", "--cache-dir", folder]
        command += ["--max-batch", str(args.max_batch), "--max-queue", str(args.max_queue)]
        command += ["--cache-memory", args.cache_memory, *more]
        command += ["--model", args.model] if args.model else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline().split("/v1")[0].rpartition(":")[2])
                assert "ready" in process.stdout.readline()
                yield process.pid, port
            finally:
                process.terminate()
                process.wait(60)


def measure(args: argparse.Namespace, pid: int, port: int) -> bool:
    """Run the rounds and print; returns whether all is well."""
    requests = bodies(args.prompts)
    started = time.perf_counter()
    expected = [ask(port, body)[1] for body in requests]
    print(f"{len(requests)} prompts alone: {time.perf_counter() - started:.1f} s")
    memory, seen = [resident_mb(pid)], Seen()
    started = time.perf_counter()
    for _ in range(args.rounds):
        threads = [
            threading.Thread(target=client, args=(n, port, requests, expected, args.requests, seen))
            for n in range(args.clients)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        memory.append(resident_mb(pid))
    wall = time.perf_counter() - started
    time.sleep(1)
    sent = args.clients * args.requests * args.rounds
    held = [metric(port, name) for name in ("queue_length", "reading", "batch_size")]
    ended = metric(port, 'requests_finished_total{reason="answered"}') - len(requests)
    cancelled = metric(port, 'requests_finished_total{reason="cancelled"}')
    print(f"{args.clients} clients, {sent} requests in {wall:.1f} s: {seen.answered} answered, {seen.left} left, "
          f"{seen.refused} times refused and asked again, {len(seen.wrong)} wrong")  # fmt: skip
    print(f"server: {ended:.0f} answered, {cancelled:.0f} cancelled; waiting, reading, generating now: {held}")
    print(f"cached prompt tokens: {metric(port, 'cached_tokens_total') / metric(port, 'prompt_tokens_total'):.0%}")
    times = {"to the first piece": seen.first_s, "to the end": seen.whole_s}
    report(args, ({"s": f"{name:18}"} | slow_end(found) for name, found in times.items()))
    print(f"{seen.tokens / wall:.0f} tokens/s answered; resident MB by round: {[round(m) for m in memory]}")
    for text in seen.wrong[:5]:
        print(text)
    return not seen.wrong and held == [0, 0, 0] and ended + cancelled == sent == seen.answered + seen.left


def main() -> int:
    """Measure, print, and return 1 where something was lost."""
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (the packaged toy)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each client, a round")
    parser.add_argument("--rounds", type=int, default=3, help="between which memory is looked at")
    parser.add_argument("--prompts", type=int, default=20, help="different ones")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=24, help="small, so that some are refused")
    parser.add_argument("--cache-memory", default="32MB", help="small, so that snapshots are dropped")
    args = parser.parse_args()
    with served(args) as (pid, port):
        well = measure(args, pid, port)
    print("nothing lost" if well else "SOMETHING WAS LOST")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
