"""What quantized keys and values cost in quality: ``python -m benchmarks.kv_quantization``.

Reads the same text with plain and with quantized keys and values of the softmax layers, teacher-forced, and compares
the distributions of the next token: KL divergence (mean, median, 99th percentile), how often the likeliest token
differs, and bytes a token. Linear states are never quantized.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from benchmarks.common import arguments, report
from ring_mlx import KVQuantization, load, render_chat
from ring_mlx.evaluation.divergence import divergence, summary
from ring_mlx.evaluation.suite import read_suite, suite_path
from ring_mlx.generation.decoding import prefill, step_sizes

STEP_TOKENS = 32


def text(tokenizer: Any, suite: str, length: int) -> list[int]:
    """Questions of a suite with their answers, one after the other."""
    ids: list[int] = []
    for q in read_suite(suite_path(suite)):
        ids += render_chat(tokenizer, [*q.messages, {"role": "assistant", "content": q.answer}], continue_last=True)
        if len(ids) >= length:
            break
    return ids[:length]


def read(model: Any, ids: mx.array, kv: KVQuantization | None) -> tuple[mx.array, float]:
    """Logits at every position but the first, which nothing quantized is before, and bytes of keys and values a token."""
    cache, sizes = model.make_cache(), [1, *step_sizes(ids.size - 1, STEP_TOKENS)]
    _, *steps = [logits[0] for _, logits in prefill(ids, model, cache, sizes, kv, every_position=True)]
    layers = [c for c in cache if hasattr(c, "offset")]
    held = sum(c.nbytes for c in layers) / (layers[0].keys[0] if kv else layers[0].keys).shape[-2]
    return mx.concatenate(steps), held


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each number of bits."""
    model, tokenizer = load(args.model)
    ids = mx.array(text(tokenizer, args.suite, args.tokens))
    group = args.group_size or (64 if model.config.head_dim % 64 == 0 else 32)
    plain, _ = read(model, ids, None)
    for bits in (None, 8, 4):
        found, nbytes = read(model, ids, bits and KVQuantization(bits, group, 0))
        d = summary([divergence(plain[:-1], found[:-1], ids[2:])])
        kls = {"KL mean": d.kl_mean, "median": d.kl_median, "99 %": d.kl_99, "flips": d.flips}
        yield {"keys and values": f"{bits} bits" if bits else "plain", **kls, "bytes a token": nbytes}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--group-size", type=int, help="by default 64, or 32 where heads are no wider")
    args = parser.parse_args()
    report(args, rows(args), args.model, f"{args.tokens} tokens")


if __name__ == "__main__":
    main()
