"""What autotuning chooses here and what that gains end to end: ``python -m benchmarks.tuning --shape mini``.

Random weights of a true shape. First the seconds that a first load may take, then more; a Markdown table of each, and the
library's own prefill and decode with the tables and with what was chosen, in alternation within one run. Nothing is kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from benchmarks.decode_profile import after_prompt, speed
from metal_kernels import choices
from metal_kernels.choices import Value
from ring_mlx.bench.random_weights import random_model
from ring_mlx.doctor.tuning import in_a_process
from ring_mlx.generation.decoding import prefill, prefill_step_or_default, step_sizes
from ring_mlx.model.model import Model
from ring_mlx.tuning import autotune, buffers, table, workloads
from ring_mlx.tuning.race import Budget

Chosen = Mapping[str, Value]


def warm_up(model: Model) -> None:
    """Compile what a load has compiled before it times anything."""
    for work in (workloads.step(model, {}), workloads.prompt(model, {})):
        work(3)  # what is tried for the first time is not compiled yet


def prefill_tps(model: Model, tokens: int) -> float:
    """Prompt tokens a second."""
    prompt = mx.arange(tokens) % model.config.vocab_size
    cache, began = model.make_cache(), time.perf_counter()
    for _, logits in prefill(prompt, model, cache, step_sizes(tokens, prefill_step_or_default())):
        mx.eval(logits)
    return tokens / (time.perf_counter() - began)


def ends(model: Model, chosen: Chosen, prompt: int, steps: int, repeats: int) -> list[str]:
    """Rows of a table: prefill and decode with the tables and with what was chosen, medians with least and greatest."""
    ways: dict[str, Chosen] = {"tables": {}, "chosen": chosen}
    seen: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):
        for way in ways if repeat % 2 else reversed(ways):
            with choices.use(ways[way]):
                cache, logits = after_prompt(model, 512)
                found = {"prefill": prefill_tps(model, prompt), "decode": speed(model, cache, logits, steps)}
            for what, tps in found.items():
                seen.setdefault((what, way), []).extend([tps] * bool(repeat))
    lines = ["| end to end, tok/s | tables | chosen | gain |", "|---|---|---|---|"]
    for what in ("prefill", "decode"):
        before, after = (seen[what, way] for way in ways)
        gain = statistics.median(after) / statistics.median(before) - 1
        lines.append(f"| {what} | {_spread(before)} | {_spread(after)} | {100 * gain:+.1f} % |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini", help="one of ring_mlx.bench.shapes (mini)")
    parser.add_argument("--bits", type=int, default=4, help="of the weights, 0 for none (4)")
    parser.add_argument("--layers", type=int, help="so many layers instead of the model's own number")
    parser.add_argument("--seconds", default="10,40", help="for all choices, several with commas (10,40)")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the end-to-end prefill (8192)")
    parser.add_argument("--steps", type=int, default=200, help="tokens of the end-to-end decode (200)")
    parser.add_argument("--repeats", type=int, default=7, help="end to end, after a warm-up (7)")
    parser.add_argument("--buffer-seconds", type=float, default=50, help="for command buffers; 0 leaves them out (50)")
    parser.add_argument("--markdown", type=Path, help="write what is printed to this file too")
    args = parser.parse_args()
    model = random_model(args.shape, args.bits or None, layers=args.layers)
    device = mx.device_info().get("device_name", "CPU")
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        if args.markdown:
            args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(f"{device}, mlx {mx.__version__}, {choices.where()}, {args.shape}, {args.bits or 'no'} bits", "")
    warm_up(model)
    for seconds in args.seconds.split(","):
        found = autotune.tune(model, Budget(float(seconds)))
        say(table.markdown(found), "")
        if found.chosen:
            say(*ends(model, found.chosen, args.prompt, args.steps, args.repeats), "")
    del model
    if args.buffer_seconds:
        what = {"random": args.shape, "bits": args.bits, "layers": args.layers}
        verdict = buffers.choose(in_a_process(what), Budget(args.buffer_seconds))
        say(*(f"| {' | '.join(row)} |" for row in table.rows([verdict])))


if __name__ == "__main__":
    main()
