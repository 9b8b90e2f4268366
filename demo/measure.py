"""What the toy is held to, measured on held-out questions: ``python -m demo.measure MODEL [MODEL ...]``.

Prints accuracy at sums of two 4-digit numbers, accuracy and nats of recall from long conversations of both kinds, the
perplexity of all tasks' thoughts and answers, and how far what each model expects next is from what the first does. With
``--decay`` a wrong rate of forgetting is put into the model, as two ports have it. Knows the packaged tokenizer's chat form.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import mlx.core as mx

import ring_mlx.model.attention as attention
from demo.data import make, render, stream
from demo.render import render_thinking_from
from demo.split import Conversation
from demo.tasks_recall import CountTokens, make_many_recall
from demo.tasks_topic import make_topic_recall
from demo.train import encode
from ring_mlx import load, render_chat
from ring_mlx.evaluation import evaluate
from ring_mlx.evaluation.divergence import diverge
from ring_mlx.evaluation.perplexity import nats as nats_of
from ring_mlx.evaluation.suite import Question, extract_answer
from ring_mlx.generation.decoding import generate_step, prefill, prefill_step_or_default, step_sizes
from ring_mlx.model.config_values import CLAMPED
from ring_mlx.model.decay import decay_rate

QUESTIONS_OF_A_CONTEXT = 10


class Recall(NamedTuple):
    """Answers from long conversations: how many right, of how many, and nats a token of the right ones."""

    right: int
    asked: int
    nats: float


def one_based(heads: int, layer: int, layers: int, _: int | str = 0) -> mx.array:
    """Decay rates as mlx-lm 0.32.2 has them: layers counted from one behind."""
    return decay_rate(heads, layer, layers, CLAMPED)


def _round(rates: mx.array) -> mx.array:
    """The rates whose factor exp(-s) went through bfloat16."""
    return -mx.log(mx.exp(-rates).astype(mx.bfloat16).astype(mx.float32))


def rounded(heads: int, layer: int, layers: int, _: int | str = 0) -> mx.array:
    """Decay rates whose factor exp(-s) went through bfloat16."""
    return _round(decay_rate(heads, layer, layers))


def both(heads: int, layer: int, layers: int, _: int | str = 0) -> mx.array:
    """Decay rates with both faults, as mlx-lm 0.32.2 has them in bfloat16."""
    return _round(one_based(heads, layer, layers))


DECAYS: dict[str, Callable[..., mx.array]] = {
    "right": decay_rate,
    "one-based": one_based,
    "rounded": rounded,
    "both": both,
}


@contextmanager
def decay(name: str) -> Iterator[None]:
    """Build models with the decay of this name as long as the context lasts."""
    kept = attention.decay_rate
    attention.decay_rate = DECAYS[name]
    try:
        yield
    finally:
        attention.decay_rate = kept


def sums(count: int, seed: int = 0) -> list[Question]:
    """Held-out questions for the sum of two 4-digit numbers."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        drawn = make("add", rng, "test")
        if [len(n) for n in re.findall(r"\d+", drawn.messages[0].content)] == [4, 4]:
            found.append(Question("add", ({"role": "user", "content": drawn.messages[0].content},), drawn.answer))
    return found


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Share of right final answers."""
    results = evaluate(model, tokenizer, questions)
    return sum(r.right for r in results) / len(results)


def recall(
    model: Any,
    tokenizer: Any,
    tokens: int,
    contexts: int,
    seed: int = 0,
    is_under_headings: bool = False,
    asking: int = QUESTIONS_OF_A_CONTEXT,
) -> Recall:
    """Ask ``asking`` held-out facts of each conversation of about ``tokens`` tokens, which is read once.

    Facts name their person, or are told under headings that do. An answer that is the likeliest at each of its tokens is
    the greedy one, so it is not decoded token by token too.
    """
    make_long = make_topic_recall if is_under_headings else make_many_recall
    rng = random.Random(seed)
    right, asked, nats, answered = 0, 0, 0.0, 0
    for _ in range(contexts):
        drawn, first = make_long(rng, "test", tokens + 60 * asking, token_counter(tokenizer), asking)
        cache, read = read_shared(model, tokenizer, drawn, first)
        for at in range(first, len(drawn.messages), 2):
            question, reply = drawn.messages[at], drawn.messages[at + 1]
            ids = prompt_ids(tokenizer, drawn, first, question.content)[read:]
            answer = tokenizer.encode(f"{reply.thinking}\n</think>\n\n{reply.content}<|role_end|>")
            logits = model(mx.array([ids + answer[:-1]]), cache.copy())[0, len(ids) - 1 :].astype(mx.float32)
            nats, answered = nats + nats_of(logits, mx.array(answer)).sum().item(), answered + len(answer)
            is_likeliest = mx.argmax(logits, axis=-1).tolist() == answer
            said = answer[:-1] if is_likeliest else greedy(model, ids, cache.copy(), tokenizer.eos_token_ids)
            text = tokenizer.decode(said)
            right, asked = right + (extract_answer(text) == extract_answer(reply.content)), asked + 1
    return Recall(right, asked, nats / answered)


def token_counter(tokenizer: Any) -> CountTokens:
    """How many tokens a text is."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(tokenizer: Any, drawn: Conversation, first: int, question: str) -> list[int]:
    """What is stated before message ``first``, then the question."""
    stated = [{"role": m.role, "content": m.content} for m in drawn.messages[:first]]
    return list(render_chat(tokenizer, [*stated, {"role": "user", "content": question}]))


def read_shared(model: Any, tokenizer: Any, drawn: Conversation, first: int) -> tuple[Any, int]:
    """A cache that has read what all questions share, and how many tokens that is."""
    one, other = (prompt_ids(tokenizer, drawn, first, text) for text in ("A", "B"))
    read = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    cache = model.make_cache()
    for _ in prefill(mx.array(one[:read]), model, cache, step_sizes(read, prefill_step_or_default())):
        pass
    return cache, read


def greedy(model: Any, ids: list[int], cache: Any, stops: set[int], most: int = 60) -> list[int]:
    """The likeliest continuation, token by token."""
    tokens = (token for token, _ in generate_step(ids, model, cache, max_tokens=most))
    return list(takewhile(lambda token: token not in stops, tokens))


def perplexity(model: Any, tokenizer: Any, count: int, seed: int = 0) -> float:
    """Of the thoughts and answers of ``count`` held-out conversations of all tasks."""
    nats, tokens = 0.0, 0
    source = stream(seed, "test")
    for _ in range(count):
        ids, counted = encode(tokenizer._tokenizer.backend_tokenizer, *render(next(source)))
        logits = model(mx.array([ids[:-1]]))[0].astype(mx.float32)
        losses = nats_of(logits, mx.array(ids[1:]))
        nats, tokens = nats + (losses * mx.array(counted[1:])).sum().item(), tokens + sum(counted[1:])
    return math.exp(nats / tokens)


def difference(model: Any, reference: Any, tokenizer: Any, tokens: int, seed: int = 0) -> float:
    """Nats by which the model's expectation of every token of one long held-out conversation is off the reference's.

    The mean of KL(reference || model) over a conversation of about ``tokens`` tokens, mostly facts and small talk.
    """
    count = token_counter(tokenizer)
    drawn = make_many_recall(random.Random(seed), "test", tokens, count, QUESTIONS_OF_A_CONTEXT)
    ids = list(tokenizer.encode(render_thinking_from(*drawn)[0]))
    return diverge(model, reference, ids, len(ids) + 1, len(ids)).kl_mean


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--decay", choices=tuple(DECAYS), action="append", help="may be given again (right)")
    parser.add_argument("--sums", type=int, default=200, help="sums to ask (200)")
    parser.add_argument("--contexts", type=int, default=10, help=f"conversations of {QUESTIONS_OF_A_CONTEXT} questions")
    parser.add_argument("--recall-tokens", type=int, default=4096, help="length of each (4096)")
    parser.add_argument("--conversations", type=int, default=400, help="for the perplexity (400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reference: Any = None
    for folder in args.models:
        for name in args.decay or ["right"]:
            with decay(name):
                model, tokenizer = load(folder)
            print(f"{folder}, decay {name}:", flush=True)
            if args.sums:
                share = accuracy(model, tokenizer, sums(args.sums, args.seed))
                print(f"  sums of 4-digit numbers: {share:.1%} of {args.sums}", flush=True)
            if args.contexts:
                for kind, is_under_headings in (("named", False), ("under headings", True)):
                    r = recall(model, tokenizer, args.recall_tokens, args.contexts, args.seed, is_under_headings)
                    shown = f"{r.right / r.asked:.1%} of {r.asked}, {r.nats:.4f} nats a token"
                    print(f"  recall at {args.recall_tokens}, {kind}: {shown}", flush=True)
            if args.conversations:
                p = perplexity(model, tokenizer, args.conversations, args.seed)
                print(f"  perplexity of thoughts and answers: {p:.5f}", flush=True)
            if reference is None:
                reference = model
            else:
                off = difference(model, reference, tokenizer, args.recall_tokens, args.seed)
                print(f"  off the first model at {args.recall_tokens} tokens: {off:.4f} nats a token", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
