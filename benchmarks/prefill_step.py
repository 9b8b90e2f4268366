"""Prefill speed by step size, and what ``exact`` costs: ``python -m benchmarks.prefill_step --shape mini``.

Alternates the settings within one run, discards a warm-up each, and prints medians. Results can be appended to a CSV.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx

from benchmarks.head import print_head
from ring_mlx.bench.random_weights import random_model
from ring_mlx.bench.report import append_csv
from ring_mlx.generation.stream import generate_step
from ring_mlx.model.model import Model

COLUMNS = ["device", "mlx", "shape", "bits", "prompt", "prefill_step", "exact", "prefill_tps", "decode_tps", "peak_gb"]


def measure(model: Model, prompt: mx.array, step: int, generate: int) -> tuple[float, float, float]:
    """Prefill tok/s, decode tok/s and peak memory in GB of one run."""
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    first = started
    for n, _ in enumerate(
        generate_step(prompt, model, model.make_cache(), max_tokens=generate, prefill_step_size=step)
    ):
        if n == 0:
            first = time.perf_counter()
    decode = (generate - 1) / max(time.perf_counter() - first, 1e-9)
    return prompt.size / (first - started), decode, mx.get_peak_memory() / 1e9


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("mini", "flash", "tiny"), default="tiny")
    parser.add_argument("--bits", type=int, default=4, help="0 for none")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--steps", default="256,512,1024,2048,4096,8192")
    parser.add_argument("--generate", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", action="store_true", help="the same with exact, side by side, at the last step size")
    parser.add_argument("--csv", help="file to append to")
    args = parser.parse_args()
    bits = args.bits or None
    model = random_model(args.shape, bits, args.group_size)
    prompt = mx.random.randint(0, model.config.vocab_size, (args.prompt,), key=mx.random.key(0))
    settings = [(int(s), False) for s in args.steps.split(",")]
    if args.exact:
        settings.append((settings[-1][0], True))
    found: dict[tuple[int, bool], list[tuple[float, float, float]]] = {s: [] for s in settings}
    for repeat in range(args.repeats + 1):
        for step, exact in settings:
            model.exact = exact
            result = measure(model, prompt, step, args.generate)
            if repeat:
                found[step, exact].append(result)
    machine = print_head(args.shape, f"{bits or 'no'} bits", f"prompt {args.prompt}", f"n={args.repeats}")
    lines = []
    for (step, exact), results in found.items():
        prefill, decode, peak = (statistics.median(r[i] for r in results) for i in range(3))
        numbers = step, int(exact), round(prefill, 1), round(decode, 1), round(peak, 3)
        measured = machine["device"], machine["mlx"], args.shape, args.bits, args.prompt, *numbers
        lines.append(dict(zip(COLUMNS, measured, strict=True)))
        print(
            f"step {step:6d} exact {int(exact)}: prefill {prefill:9.1f} tok/s, decode {decode:7.1f} tok/s, peak {peak:.3f} GB"
        )
    if args.csv:
        append_csv(Path(args.csv), COLUMNS, lines)


if __name__ == "__main__":
    main()
