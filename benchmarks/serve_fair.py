"""``python -m benchmarks.serve_fair``: what a short request waits beside a prompt of 30,000 tokens, and beside a burst.

A server process of its own. First both alone; then short requests, one after the other, while the long prompt is read;
then one request of a client while another's burst waits, with a key of its own and without. By default of a tiny model with a
long context, so that the numbers show shares, not speed; ``--model`` takes any checkpoint.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import arguments, report
from benchmarks.serve_load import FILLER, ask, served
from tests.parrot import make_parrot

SHORT_TOKENS = 32


def small_model(folder: Path) -> Path:
    """A checkpoint of two layers with room for a long prompt, whose every token is a word."""
    words = [f" w{n}" for n in range(SHORT_TOKENS)]
    return make_parrot(folder, words, max_position_embeddings=65_536, num_hidden_layers=2, layer_group_size=2)


def short(number: int) -> dict[str, Any]:
    """A request that shares no prefix with others, and whose answer has a fixed length."""
    text = f"{number} and {number + 1}?"
    return {"messages": [{"role": "user", "content": text}], "max_tokens": SHORT_TOKENS}


def timed(port: int, body: dict[str, Any], key: str = "none") -> tuple[float, float]:
    """Seconds to the first piece and to the end."""
    started = time.perf_counter()
    status, _, first, _ = ask(port, body, key=key)
    assert status == 200, status
    return first, time.perf_counter() - started


def beside(port: int, long: dict[str, Any]) -> tuple[float, list[tuple[float, float]]]:
    """Seconds to the long prompt's first piece, and those of short requests that ended before."""
    found: list[tuple[float, float]] = []
    took: list[float] = []
    thread = threading.Thread(target=lambda: took.append(timed(port, long)[0]))
    thread.start()
    time.sleep(0.3)
    number = 1000
    while thread.is_alive():
        one = timed(port, short(number), key="other")
        if thread.is_alive():
            found.append(one)
        number += 2
    thread.join()
    return took[0], found


def burst(port: int, count: int, key: str) -> float:
    """Seconds to the first piece of a request beside so many of another client's."""
    threads = [threading.Thread(target=timed, args=(port, short(5000 + 2 * n), "burst")) for n in range(count)]
    for t in threads:
        t.start()
    time.sleep(0.2)
    first, _ = timed(port, short(9000), key)
    for t in threads:
        t.join()
    return first


def measure(args: argparse.Namespace, port: int) -> list[tuple[str, float]]:
    """Medians of ``--runs``, in turns."""
    seen: dict[str, list[float]] = {}

    def note(name: str, *values: float) -> None:
        seen.setdefault(name, []).extend(values)

    for run in range(args.runs):
        text = f"{run} " + FILLER * int(args.tokens / args.filler_tokens)
        long = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        first, whole = timed(port, short(2 * run))
        note("short request alone: first piece", first)
        note(f"short request alone: {SHORT_TOKENS} tokens", whole)
        note("long prompt alone: first piece", timed(port, long | {"seed": 1})[0])
        long["messages"] = [{"role": "user", "content": f"again {text}"}]
        took, found = beside(port, long)
        note("long prompt beside short requests: first piece", took)
        note("short request beside it: first piece", *(f for f, _ in found))
        note(f"short request beside it: {SHORT_TOKENS} tokens", *(w for _, w in found))
        note("short request beside a burst of another client", burst(port, args.burst, "other"))
        note("short request beside a burst of the same client", burst(port, args.burst, "burst"))
    return [(name, median(values)) for name, values in seen.items()]


def main() -> int:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (a small random one)")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the long prompt")
    parser.add_argument("--burst", type=int, default=40, help="requests of a burst")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    args.max_batch, args.max_queue, args.cache_memory = 8, 64, "256MB"
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or str(small_model(Path(folder) / "model"))
        with served(args, ("--no-store", "--no-read-ahead")) as (_, port):
            args.filler_tokens = counted(port, FILLER * 100) / 100
            report(args, ({"what": f"{name:52}", "median s": round(s, 3)} for name, s in measure(args, port)))
    return 0


def counted(port: int, text: str) -> float:
    """Tokens of a text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1})
    connection.request("POST", "/v1/messages/count_tokens", body, {"Content-Type": "application/json"})
    count = float(json.loads(connection.getresponse().read())["input_tokens"])
    connection.close()
    return count


if __name__ == "__main__":
    raise SystemExit(main())
