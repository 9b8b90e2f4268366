"""Latency of each turn of a growing conversation, ours beside mlx-lm's: ``python -m benchmarks.turn_latency``.

All run the same model object on the same prompts, so only what is reused differs.

- ours: a session's scheduler with its snapshots, read ahead while the user would type, and restarted before one turn.
- theirs: mlx_lm's ``stream_generate`` with its ``LRUPromptCache``: a cache that ends where the prompt goes on is
  continued, one that goes further is trimmed if every layer can be, which a linear state cannot.
- server: the same with what mlx_lm.server adds since 0.32: a copy of the cache before the thinking tag of the prompt.
  It is never restarted, which would empty it.
"""

from __future__ import annotations

import copy
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from benchmarks.common import arguments, report
from ring_mlx import load, render_chat
from ring_mlx.engine.branches import Renderer, next_turn
from ring_mlx.engine.events import End, Event, Sampling, SessionOptions, Statistics
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.request import Request
from ring_mlx.engine.scheduler import Scheduler
from ring_mlx.generation.decoding import prefill, step_sizes

STEP_TOKENS = 2048
TEXTS = (
    "What is 27 + 35, and how would you explain the sum to a child who has never added before?",
    "Now take 10 away from it, and tell me whether what is left is more or less than fifty.",
    "Please write the word river backwards, and then say how many letters it has in all.",
    "Which day comes three days after Friday, if the week goes on as weeks always do?",
)
ANSWER = (
    "Here is what I make of it. First I looked at what was asked, then I took the numbers or the words one at a time, "
    "and at last I put them together again. So the result is the one that I gave above, and it can be checked by hand."
)


def ours(scheduler: Scheduler, messages: list[dict[str, Any]]) -> tuple[float, int]:
    """Seconds to the first token, and prompt tokens read for it."""
    request = Request(messages, Sampling(temp=0), max_tokens=24, thinking_budget=8)
    scheduler.admit(request)
    while scheduler.busy:
        scheduler.step()
    events: list[Event | Exception] = []
    while not request.events.empty():
        events.append(request.events.get())
    assert isinstance(events[-1], End)
    (s,) = (e for e in events if isinstance(e, Statistics))
    return s.time_to_first_token_s, s.read_tokens


def theirs(model: Any, tokenizer: Any, caches: LRUPromptCache, prompt: list[int], tail: int = 0) -> tuple[float, int]:
    """The same for mlx-lm; with ``tail`` the cache is also kept before the last tokens of the prompt."""
    started = time.perf_counter()
    cache, rest = caches.fetch_nearest_cache("model", prompt)
    read = len(rest)
    cache = make_prompt_cache(model) if cache is None else cache
    if 0 < tail < len(rest):
        for _ in prefill(mx.array(rest[:-tail]), model, cache, step_sizes(len(rest) - tail, STEP_TOKENS)):
            pass
        caches.insert_cache("model", prompt[:-tail], copy.deepcopy(cache), cache_type="user")
        rest = rest[-tail:]
    first, said = 0.0, []
    for response in stream_generate(model, tokenizer, rest, max_tokens=24, prompt_cache=cache):
        first = first or time.perf_counter() - started
        said.append(response.token)
    caches.insert_cache("model", (prompt + said)[: cache[-1].offset], cache)
    return first, read


def measure(path: str, turns: int, restart: int) -> list[dict[str, Any]]:
    """One row a turn."""
    model, tokenizer = load(path)
    rows, messages = [], [{"role": "system", "content": "Answer briefly, and think before you do."}]
    with tempfile.TemporaryDirectory() as folder:
        options = SessionOptions(model=path, store=folder)
        loaded = LoadedModel(model, tokenizer, options)
        scheduler, caches, server = Scheduler(loaded, Metrics()), LRUPromptCache(), LRUPromptCache()
        tail = len(tokenizer.encode("<think>\n", add_special_tokens=False))
        ours(scheduler, [{"role": "user", "content": "warm up"}])
        for turn in range(1, turns + 1):
            if turn == restart:
                scheduler = Scheduler(loaded, Metrics())
            messages.append({"role": "user", "content": f"{turn}. {TEXTS[turn % len(TEXTS)]}"})
            prompt = render_chat(tokenizer, messages)
            row: dict[str, Any] = {"turn": turn, "prompt_tokens": len(prompt)}
            row["ours_s"], row["ours_read"] = ours(scheduler, messages)
            row["theirs_s"], row["theirs_read"] = theirs(model, tokenizer, caches, prompt)
            row["server_s"], row["server_read"] = theirs(model, tokenizer, server, prompt, tail)
            rows.append(row | {"note": "after a restart" if turn == restart else ""})
            messages.append({"role": "assistant", "content": ANSWER})
            read_ahead(scheduler, messages)
    return rows


def read_ahead(scheduler: Scheduler, messages: list[dict[str, Any]]) -> None:
    """What the session's thread does while the user types; the answer is the one that all three are given."""
    scheduler._ahead = lambda: next_turn(Renderer(scheduler.loaded.tokenizer), messages[:-1], messages[-1])
    scheduler.use_idle_time(lambda: False)


def medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a turn, with the median of every number."""
    return [
        same[0] | {c: statistics.median(row[c] for row in same) for c in same[0] if c != "note"}
        for same in zip(*runs, strict=True)
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time to first token over the length of the prompt."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    prompts = [row["prompt_tokens"] for row in rows]
    labels = {
        "theirs": "mlx-lm: stream_generate, LRUPromptCache",
        "server": "mlx-lm: with the server's copy before <think>",
        "ours": "ring_mlx.Session, restarted before one turn",
    }
    for name, label in labels.items():
        axes.plot(prompts, [row[f"{name}_s"] for row in rows], marker="o", label=label)
    axes.set(xlabel="tokens of the conversation", ylabel="time to first token, s", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--restart", type=int, default=9, help="the turn before which ours starts anew")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many conversations (3)")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    args = parser.parse_args()
    rows = medians([measure(args.model, args.turns, args.restart) for _ in range(args.repeats)])
    report(args, rows, f"{platform.machine()} {platform.system()}", f"mlx-lm {version('mlx-lm')}")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
