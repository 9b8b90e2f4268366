"""Whether memory grows while decoding: ``python -m benchmarks.decode_memory --shape golden --tokens 10000``.

Every so many tokens: active memory beyond the weights, what of it is keys, values and states, which grow by their nature,
and what is left, which should be flat. Also the process's resident peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from benchmarks.common import arguments, random, report, resident_peak_bytes
from ring_mlx.generation.decoding import generate_step


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for every so many tokens."""
    model = random(args)
    cache = model.make_cache()
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    for n, _ in enumerate(generate_step([1, 2, 3], model, cache, max_tokens=args.tokens), 1):
        if n % args.every == 0 or n == 1:
            active, held = mx.get_active_memory() - weights, cache.nbytes
            sizes = {"active": active, "cache": held, "left": active - held, "peak": mx.get_peak_memory() - weights}
            sizes["resident peak"] = resident_peak_bytes()
            yield {"tokens": n} | {f"{name} MB": size / 1e6 for name, size in sizes.items()}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="golden", bits=0)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    args = parser.parse_args()
    report(args, rows(args), "weights excluded")


if __name__ == "__main__":
    main()
