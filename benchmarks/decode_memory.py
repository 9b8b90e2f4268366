"""Whether memory grows while decoding: ``python -m benchmarks.decode_memory --shape golden --tokens 10000``.

Prints active memory, cache and peak every so many tokens, less what keys and values took, which grow by their nature;
what is left should be flat. Also the process's resident set where the system tells it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from benchmarks.head import print_head
from ring_mlx.bench.random_weights import random_model
from ring_mlx.bench.shapes import SHAPES
from ring_mlx.generation.stream import generate_step


def resident_mb() -> float:
    """The process's resident set in MB, or nan."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 1e6 if status.exists() else float("nan")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="golden")
    parser.add_argument("--bits", type=int, default=0, help="0 leaves the weights unquantised")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    args = parser.parse_args()
    model = random_model(args.shape, bits=args.bits or None)
    cache = model.make_cache()
    mx.reset_peak_memory()
    print_head(args.shape, "weights excluded")
    print("tokens  active MB  cache MB  left MB  peak MB  resident MB", flush=True)
    weights = mx.get_active_memory()
    for n, _ in enumerate(generate_step([1, 2, 3], model, cache, max_tokens=args.tokens), 1):
        if n % args.every == 0 or n == 1:
            active = (mx.get_active_memory() - weights) / 1e6
            held = cache.nbytes / 1e6
            peak = (mx.get_peak_memory() - weights) / 1e6
            print(
                f"{n:6d}  {active:9.3f}  {held:8.3f}  {active - held:7.3f}  {peak:7.3f}  {resident_mb():11.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
