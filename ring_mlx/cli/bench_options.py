"""The options of ``ring-mlx bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ring_mlx import options
from ring_mlx.bench.config import BenchError
from ring_mlx.options import group_of

UNQUANTIZED = 16
# Options that do not work with experts on disk, and why.
NO_STREAMED = {
    "random": "experts are read from a checkpoint's files, and random weights have none",
    "vs": "mlx-lm would need all experts in memory",
    "floor": "the rate of the disk is not measured",
    "ops": "a layer waits for its experts, so there is no graph of a whole step",
}
HELP = {
    "random": "random weights at the shapes of this model (golden is tiny) instead of a checkpoint",
    "bits": "bits of --random (4); 16 leaves the weights in bfloat16",
    "layers": "number of layers of --random, instead of all",
    "prompt": "prompt tokens, several with commas (512,2048,8192, up to the context)",
    "csv": "append a row for each cell, with a header if the file is new",
    "vs_max": "longest prompt that mlx-lm reads itself, token by token; longer ones are read by ours (2048)",
    "floor": "measure bandwidth and matmul rate, and print our share of the possible speed",
    "ops": "count the dispatches of a decode step by primitive",
}


def add(parser: argparse.ArgumentParser) -> None:
    options.add_model_options(parser)
    r = group_of(parser, "model")
    r.add_argument("--random", choices=options.RANDOM_SHAPES, help=HELP["random"])
    r.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8, UNQUANTIZED), help=HELP["bits"])
    r.add_argument("--layers", type=options.positive_int, help=HELP["layers"])
    options.add_expert_options(parser)
    options.add_distributed_option(parser)
    m = parser.add_argument_group("what is measured")
    m.add_argument("-p", "--prompt-tokens", type=options.counts, metavar="N,N", help=HELP["prompt"])
    m.add_argument("-g", "--generate", type=options.positive_int, default=128, help="tokens after the first (128)")
    m.add_argument("-n", "--repeats", type=options.positive_int, default=5, help="runs after one warm-up (5)")
    m.add_argument("--batch-size", type=options.counts, default=(1,), metavar="N,N", help="rows of equal length (1)")
    m.add_argument("--prefill-step-size", type=options.positive_int, help=options.STEP_HELP)
    m.add_argument("--vs", choices=("mlx-lm",), help="also run stock mlx-lm on the same weights, in alternation")
    m.add_argument("--vs-max-prefill", type=options.natural_int, default=2048, metavar="T", help=HELP["vs_max"])
    m.add_argument("--vs-repeats", type=options.positive_int, help="repetitions of mlx-lm (-n, but at most 3)")
    m.add_argument("--floor", action="store_true", help=HELP["floor"])
    m.add_argument("--ops", action="store_true", help=HELP["ops"])
    m.add_argument("--seed", type=options.natural_int, default=0, help="seed of prompts and random weights (0)")
    options.add_quiet_option(parser)
    f = parser.add_argument_group("files")
    f.add_argument("--csv", type=Path, help=HELP["csv"])
    f.add_argument("--json", type=Path, help="write one JSON object")
    f.add_argument("--markdown", type=Path, help="write a Markdown table")
    f.add_argument("--plot", type=Path, help="write a PNG of speed against context; needs matplotlib")


def check(args: argparse.Namespace) -> None:
    """Raises BenchError for options that exclude each other."""
    if args.random is not None and (args.model is not None or args.revision is not None):
        raise BenchError("--random makes its own weights; leave --model and --revision out, or --random.")
    if args.random is None and (args.bits is not None or args.layers is not None):
        raise BenchError("--bits and --layers shape random weights; add --random mini or --random flash.")
    for flag, value in (("--random", args.random), ("--vs", args.vs)):
        if args.adapter_path is not None and value is not None:
            raise BenchError(f"--adapter-path does not work with {flag} {value}; leave one of them out.")
    if options.loading_options(args)["expert_cache_bytes"] is None:
        return
    for name, reason in NO_STREAMED.items():
        if getattr(args, name):
            raise BenchError(f"--{name} does not work with --expert-cache-bytes: {reason}; leave one of them out.")
