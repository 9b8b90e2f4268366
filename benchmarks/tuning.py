"""What autotuning chooses here and what that gains end to end: ``python -m benchmarks.tuning --shape mini``.

Random weights of a true shape. First the seconds that a first load may take, then more; a Markdown table of each, and the
library's own prefill and decode with the tables and with what was chosen, in alternation within one run. Nothing is kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.common import alternate, arguments, random, report
from benchmarks.decode_profile import after_prompt, speed
from metal_kernels import choices
from metal_kernels.choices import Chosen
from ring_mlx.doctor.tuning import in_a_process
from ring_mlx.generation.decoding import prefill, prefill_step_or_default, step_sizes
from ring_mlx.model.model import Model
from ring_mlx.tuning import autotune, buffers, table, workloads
from ring_mlx.tuning.race import Budget


def prefill_tps(model: Model, tokens: int) -> float:
    """Prompt tokens a second."""
    prompt = mx.arange(tokens) % model.config.vocab_size
    cache, began = model.make_cache(), time.perf_counter()
    *_, (_, logits) = prefill(prompt, model, cache, step_sizes(tokens, prefill_step_or_default()))
    mx.eval(logits)
    return tokens / (time.perf_counter() - began)


def ends(model: Model, chosen: Chosen, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prefill and decode with the tables and with what was chosen."""

    def run(what: str, used: Chosen) -> float:
        with choices.use(used):
            if what == "prefill":
                return prefill_tps(model, args.prompt)
            return speed(model, *after_prompt(model, 512), args.steps)

    for what in ("prefill", "decode"):
        ways: dict[str, Callable[[], float]] = {"tables": partial(run, what, {}), "chosen": partial(run, what, chosen)}
        found = alternate(ways, args.repeats)
        gain = statistics.median(found["chosen"]) / statistics.median(found["tables"]) - 1
        yield {"end to end, tok/s": what, **found, "gain %": 100 * gain}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, shape="mini", repeats=7)
    parser.add_argument("--seconds", default="10,40", help="for all choices, several with commas (10,40)")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the end-to-end prefill (8192)")
    parser.add_argument("--steps", type=int, default=200, help="tokens of the end-to-end decode (200)")
    parser.add_argument("--buffer-seconds", type=float, default=50, help="for command buffers; 0 leaves them out (50)")
    args = parser.parse_args()
    model = random(args)
    for work in (workloads.step(model, {}), workloads.prompt(model, {})):
        work(3)  # what is tried for the first time is not compiled yet
    for seconds in args.seconds.split(","):
        found = autotune.tune(model, Budget(float(seconds)))
        print(table.markdown(found), flush=True)
        if found.chosen:
            report(args, ends(model, found.chosen, args), f"{seconds} s of tuning")
    del model
    if args.buffer_seconds:
        what = {"random": args.shape, "bits": args.bits, "layers": args.layers}
        verdict = buffers.choose(in_a_process(what), Budget(args.buffer_seconds))
        print(*(f"| {' | '.join(row)} |" for row in table.rows([verdict])), sep="\n")


if __name__ == "__main__":
    main()
