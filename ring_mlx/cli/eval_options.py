"""The options of ``ring-mlx eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ring_mlx import options
from ring_mlx.errors import OptionError
from ring_mlx.generation.defaults import MAX_TOKENS
from ring_mlx.options import group_of

# Questions of each task of a packaged suite, with which the toy needs about a minute.
QUICK_LIMIT = 1
SUITE_ONLY = ("task", "limit", "full", "batch_size", "show_wrong")
# Flags of one measurement, and the flag that requests it.
NEEDS = {
    "window": "perplexity",
    "stride": "perplexity",
    "kl": "perplexity",
    "depths": "recall",
    "needles": "recall",
    "filler": "recall",
    "seed": "recall",
    "plot": "recall",
}
HELP = {
    "suite": "demo, or a gzipped JSON-lines file (demo, if no other measurement is asked for)",
    "limit": f"the most questions of each task ({QUICK_LIMIT} of a packaged suite; all of a file)",
    "perplexity": "perplexity of this text file, in sliding windows",
    "window": "tokens read at a time (4096, or less if context or text are shorter)",
    "stride": "tokens counted at a time after the first window (half of it)",
    "kl": "also read the text with this model and measure the divergence from it",
    "recall": "state facts in texts of these lengths in tokens, and ask for them at the end",
    "depths": "number of places for facts, evenly from start to end (5)",
    "needles": "facts at each place, each asked for separately (3)",
    "filler": "text file whose sentences hide the facts (small talk)",
    "plot": "write the recall as a PNG; needs matplotlib",
}


def add(parser: argparse.ArgumentParser) -> None:
    options.add_model_options(parser)
    options.add_setting(group_of(parser, "answer"), "max_tokens", MAX_TOKENS, "-m")
    group_of(parser, "output").add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_quiet_option(parser)
    s = parser.add_argument_group("a suite of questions with one right answer")
    s.add_argument("--suite", help=HELP["suite"])
    s.add_argument("--task", action="append", help="only this task of the suite; may be repeated")
    s.add_argument("--limit", type=options.positive_int, metavar="N", help=HELP["limit"])
    s.add_argument("--full", action="store_true", help="all questions of a packaged suite")
    s.add_argument("--batch-size", type=options.positive_int, help="questions at a time (16)")
    s.add_argument("--show-wrong", action="store_true", help="print each wrong answer beside the right one")
    p = parser.add_argument_group("perplexity and divergence on a text")
    p.add_argument("--perplexity", type=Path, metavar="FILE", help=HELP["perplexity"])
    p.add_argument("--window", type=options.positive_int, metavar="T", help=HELP["window"])
    p.add_argument("--stride", type=options.positive_int, metavar="T", help=HELP["stride"])
    p.add_argument("--kl", metavar="REFERENCE_MODEL", help=HELP["kl"])
    r = parser.add_argument_group("recall at depth")
    r.add_argument("--recall", type=options.counts, metavar="T,T", help=HELP["recall"])
    r.add_argument("--depths", type=options.positive_int, metavar="N", help=HELP["depths"])
    r.add_argument("--needles", type=options.positive_int, metavar="N", help=HELP["needles"])
    r.add_argument("--filler", type=Path, metavar="FILE", help=HELP["filler"])
    r.add_argument("--seed", type=options.natural_int, help="seed of facts and small talk (0)")
    r.add_argument("--plot", type=Path, metavar="PNG", help=HELP["plot"])


def check(args: argparse.Namespace) -> None:
    """Raises OptionError for a flag of a measurement that is not requested."""
    for flag, needed in NEEDS.items():
        if getattr(args, flag) is not None and getattr(args, needed) is None:
            raise OptionError(f"--{flag} is for --{needed}; add --{needed} as well, or leave --{flag} out.")
    if args.suite is None and args.perplexity is None and args.recall is None:
        args.suite = "demo"
    for flag in SUITE_ONLY:
        if args.suite is None and getattr(args, flag):
            shown = flag.replace("_", "-")
            raise OptionError(f"--{shown} is for --suite; add --suite demo as well, or leave --{shown} out.")
    if args.full and args.limit is not None:
        raise OptionError(f"--full asks all questions, but --limit {args.limit} is given too; leave one of them out.")
