"""What quantised keys and values cost in quality: ``python -m benchmarks.kv_quantization``.

Reads the same text with plain and with quantised keys and values of the softmax layers, teacher-forced, and compares
the distributions of the next token: KL divergence (mean, median, 99th percentile), how often the likeliest token
differs, and bytes a token. Linear states are never quantised.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np

from ring_mlx import KVQuantization, demo_model_path, load, render_chat
from ring_mlx.evaluation.suite import read_suite, suite_path
from ring_mlx.generation.decoding import prefill

STEP_TOKENS = 32


def text(tokenizer: Any, suite: str, length: int) -> list[int]:
    """Questions of a suite with their answers, one after the other."""
    ids: list[int] = []
    for q in read_suite(suite_path(suite)):
        ids += render_chat(tokenizer, [*q.messages, {"role": "assistant", "content": q.answer}], continue_last=True)
        if len(ids) >= length:
            break
    return ids[:length]


def logprobs(model: Any, ids: list[int], kv: KVQuantization | None) -> tuple[mx.array, float]:
    """Of the next token at every position [T, vocab], and bytes of keys and values a token."""
    cache, rows = model.make_cache(), []
    for at in range(0, len(ids), STEP_TOKENS):
        part = mx.array(ids[at : at + STEP_TOKENS])
        if at == 0:
            for _, _first in prefill(part[:1], model, cache, [1], kv):
                pass
            part = part[1:]
        logits = model(part[None], cache)[0].astype(mx.float32)
        mx.eval(logits, cache.state)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    layers = [c for c in cache if hasattr(c, "offset")]
    held = sum(c.nbytes for c in layers) / (layers[0].keys[0] if kv else layers[0].keys).shape[-2]
    return mx.concatenate(rows), held


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--group-size", type=int, help="by default 64, or 32 where heads are no wider")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    ids = text(tokenizer, args.suite, args.tokens)
    group = args.group_size or (64 if model.config.head_dim % 64 == 0 else 32)
    plain, plain_bytes = logprobs(model, ids, None)
    print(f"{len(ids)} tokens, groups of {group}\n")
    print("| keys and values | KL mean | median | 99 % | likeliest token differs | bytes a token |")
    print("|---|---|---|---|---|---|")
    print(f"| plain | 0 | 0 | 0 | 0 % | {plain_bytes:.0f} |")
    for bits in (8, 4):
        found, nbytes = logprobs(model, ids, KVQuantization(bits, group, 0))
        kl = np.array((mx.exp(plain) * (plain - found)).sum(axis=-1))
        flips = float((mx.argmax(plain, axis=-1) != mx.argmax(found, axis=-1)).astype(mx.float32).mean())
        middle, high = np.percentile(kl, [50, 99])
        print(f"| {bits} bits | {kl.mean():.2g} | {middle:.2g} | {high:.2g} | {100 * flips:.2f} % | {nbytes:.0f} |")


if __name__ == "__main__":
    main()
