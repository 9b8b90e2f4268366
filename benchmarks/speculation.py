"""What several tokens a step cost and gain: ``python -m benchmarks.speculation --shape mini``, or ``--toy`` for real texts.

With random weights, after a cache of random numbers: the time of a step of T tokens, all or half of which are kept, over that of
a step of one, each waited for, and over that of a token of `decode`, which is computed while the one before is handled; and that
of the first two steps there, which compile. Then tokens a second of `speculate` with a drafter that is told the text and spoils
each token with a probability, over those of `decode`. The text is forced on both, since the likeliest tokens of random weights are
too close to each other. With the toy: prompt lookup over tasks that repeat their prompts and tasks that do not.
"""

from __future__ import annotations

import argparse
import random as chance
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.common import alternate, arguments, random, report
from ring_mlx import demo_model_path, load, render_chat
from ring_mlx.generation.decoding import decode, prefill, step_sizes
from ring_mlx.generation.drafts import MOST_TOKENS, Draft, Drafter, PromptLookup
from ring_mlx.generation.pace import Pace
from ring_mlx.generation.speculation import speculate
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model
from ring_mlx.model.tentative import Tentative
from ring_mlx.options import counts

TASKS = {
    "sort": "Sort these numbers: 41 7 93 25 68 12",
    "recall": "Remember that the cat is called Tom and the dog is called Rex. What is the cat called?",
    "repeat": "Repeat: one two three four five. one two three four five. one two three four",
    "add": "What is 4756 + 3879?",
    "spell": 'Spell the word "lantern" backwards.',
    "small talk": "What can you do?",
}


class Told:
    """Drafts a text that it is told, each token right with a probability."""

    def __init__(self, text: Sequence[int], right: float, vocabulary: int) -> None:
        draws = chance.Random(0)
        self._drafts = [t if draws.random() < right else (t + 1) % vocabulary for t in text]
        self._at = 0

    def add(self, token: int) -> None:
        """Take the next token."""
        self._at += 1

    def draft(self, most: int) -> Draft:
        """The next tokens."""
        return Draft(self._drafts[self._at : self._at + most], 1)


def filled(model: Model, context: int) -> HybridCache:
    """A cache of so many tokens that nobody read: what a step costs depends on its size only."""
    cache, dtype = model.make_cache(), model.model.norm.weight.dtype
    for layer, c in zip(model.layers, cache, strict=True):
        a = layer.attention
        if layer.is_linear:
            c[0] = mx.random.normal((1, a.num_heads, a.head_dim, a.head_dim))
        else:
            shape = (2, 1, a.num_key_value_heads, context, a.head_dim)
            c.update_and_fetch(*mx.random.normal(shape).astype(dtype))
    mx.eval(cache.state)
    return cache


def step_times(model: Model, start: HybridCache, tokens: int, kept: int, steps: int) -> list[float]:
    """Milliseconds of each step, which keeps so many of its tokens."""
    times, cache = [], start.copy()
    for n in range(steps):
        began = time.perf_counter()
        if tokens == 1:
            mx.eval(mx.argmax(model(mx.array([[n + 1]]), cache, last_only=True)[:, -1], axis=-1))
        else:
            tentative = Tentative(model, cache, [range(n + 1, n + 1 + tokens)])
            mx.eval(mx.argmax(tentative.logits, axis=-1))
            tentative.keep([kept])
            mx.eval(cache.state)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def costs(model: Model, contexts: Sequence[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each context and length of a step."""
    for context in contexts:
        start = filled(model, context)
        cases = [(t, kept) for t in (1, 2, 4, 8) for kept in dict.fromkeys((t, (t + 1) // 2))]
        cold = [step_times(model, start, *case, 2) for case in cases]
        ways = {str(case): partial(_median_of_steps, model, start, *case, args.steps) for case in cases}
        found = alternate({"decode": partial(_decode_ms, model, start, 2 * args.steps)} | ways, args.repeats)
        one, token = statistics.median(found[str(cases[0])]), statistics.median(found["decode"])
        for case, first in zip(cases, cold, strict=True):
            times = found[str(case)]
            named = {"context": context, "tokens": case[0], "kept": case[1], "ms": times}
            ms = statistics.median(times)
            yield {
                **named,
                "over one": ms / one,
                "over decode": ms / token,
                "first ms": first[0],
                "second ms": first[1],
            }


def _median_of_steps(*arguments: Any) -> float:
    return statistics.median(step_times(*arguments))


def _decode_ms(model: Model, start: HybridCache, steps: int) -> float:
    logits = mx.zeros((1, model.config.vocab_size))
    return 1e3 / tokens_a_second(decode(logits, model, start.copy(), mx.array([0]), max_tokens=steps))


def tokens_a_second(steps: Iterator[tuple[int, mx.array]]) -> float:
    """After the first token."""
    next(steps)
    began = time.perf_counter()
    return sum(1 for _ in steps) / (time.perf_counter() - began)


def compared(
    model: Model,
    logits: mx.array,
    start: HybridCache,
    ids: Sequence[int],
    most: int,
    repeats: int,
    drafter: Callable[[], Drafter],
    text: Sequence[int] = (),
) -> dict[str, Any]:
    """Tokens a second with drafts over those without, in alternation, with one pace; ``text`` is forced, if there is one."""
    pace = Pace()

    def forced() -> dict[str, Any]:
        return {"max_tokens": most, "next_forced": partial(next, iter(text), None)}

    def plain() -> float:
        return tokens_a_second(decode(logits, model, start.copy(), mx.array(list(ids)), **forced()))

    def drafted() -> float:
        return tokens_a_second(speculate(logits, model, start.copy(), ids, drafter(), pace, **forced()))

    found = alternate({"plain": plain, "drafted": drafted}, repeats)
    return {
        "plain tok/s": found["plain"],
        "drafted tok/s": found["drafted"],
        "ratio": statistics.median(found["drafted"]) / statistics.median(found["plain"]),
        "accepted": pace.accepted / pace.drafted if pace.drafted else 0.0,
        "tokens a step": pace.tokens / max(1, pace.steps),
    }


def told(model: Model, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each probability."""
    start, vocabulary = filled(model, 512), model.config.vocab_size
    logits = model(mx.array([[1]]), start, last_only=True)[:, -1]
    text = mx.random.randint(0, vocabulary, (args.tokens,), key=mx.random.key(0)).tolist()
    for tokens in range(2, MOST_TOKENS + 2):  # whose first steps compile, as told above
        step_times(model, start, tokens, 1, 2)
    for right in (0.0, 0.3, 0.6, 0.9):
        make = partial(Told, text, right, vocabulary)
        yield {"right": right, **compared(model, logits, start, [0], args.tokens, args.repeats, make, text)}


def tasks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each task of the toy."""
    model, tokenizer = load(demo_model_path())
    for name, question in TASKS.items():
        ids = render_chat(tokenizer, [{"role": "user", "content": question}])
        cache = model.make_cache()
        *_, (_, logits) = prefill(mx.array(ids), model, cache, step_sizes(len(ids), 128))
        most = 1
        for token, _ in decode(logits, model, cache.copy(), mx.array(ids), max_tokens=args.tokens):
            most += 1
            if token in tokenizer.eos_token_ids:
                break
        yield {
            "task": name,
            "tokens": most,
            **compared(model, logits, cache, ids, most, args.repeats, partial(PromptLookup, ids)),
        }


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="mini", repeats=5)
    parser.add_argument(
        "--contexts", type=counts, default=(512, 8192, 32768), help="tokens before the steps (512,8192,32768)"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each length and round (20)")
    parser.add_argument("--tokens", type=int, default=256, help="of each text (256)")
    parser.add_argument("--toy", action="store_true", help="tasks of the packaged model instead of random weights")
    args = parser.parse_args()
    if args.toy:
        del args.shape
        report(args, tasks(args), f"the packaged toy, prompt lookup, at most {MOST_TOKENS} drafted tokens")
        return
    model = random(args)
    report(args, costs(model, args.contexts, args), "a step of several tokens")
    report(args, told(model, args), "a drafter that is told the text")


if __name__ == "__main__":
    main()
