"""``ring-mlx doctor``: whether this machine can run Ring models, and which decay a checkpoint was trained with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_mlx.cli import options
from ring_mlx.cli.parsing import add_command, group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.errors import OptionError
from ring_mlx.terminal_text import for_output, harmless_json, note

if TYPE_CHECKING:
    from ring_mlx.doctor.finding import Finding

HAS_PROBLEM = 1
HELP = {
    "decay": "instead: which formula of the decay this model's weights were trained with",
    "text": "text file for --check-decay (long conversations of the demo suite)",
    "tokens": "tokens of text read under each formula, at most (about a minute's, 1,024 to 16,384)",
    "write": "put the formula into the model's config.json, if --check-decay finds one",
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        "what this machine can run, and what it lacks",
        "Whether this machine can run Ring models, and which decay a checkpoint was trained with.",
        "ring-mlx doctor",
    )
    group_of(parser, "output").add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_quiet_option(parser)
    d = parser.add_argument_group("decay")
    d.add_argument("--check-decay", metavar="MODEL", help=HELP["decay"])
    d.add_argument("--revision", help="branch, tag or commit of a hub repository")
    options.add_decay_option(d)
    d.add_argument("--text", type=Path, metavar="FILE", help=HELP["text"])
    d.add_argument("--tokens", type=options.positive_int, metavar="T", help=HELP["tokens"])
    d.add_argument("--write-decay", action="store_true", default=None, help=HELP["write"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look and print; returns 1 if there is a problem."""
    from ring_mlx.doctor.finding import PROBLEM, table

    found = _decay(args) if args.check_decay is not None else _machine(args)
    problems = sum(f.status == PROBLEM for f in found)
    if args.json:
        print(harmless_json({"problems": problems, "findings": [asdict(f) for f in found]}))
    else:
        print(for_output(table(found)))
    return HAS_PROBLEM if problems else 0


def _machine(args: argparse.Namespace) -> Sequence[Finding]:
    for flag in ("revision", "decay-layer-offset", "text", "tokens", "write-decay"):
        if getattr(args, flag.replace("-", "_")) is not None:
            raise OptionError(f"--{flag} is for --check-decay; add --check-decay MODEL, or leave --{flag} out.")
    from ring_mlx.doctor.examine import examine

    with bar_of(args, "doctor", "checks") as bar:
        return examine(bar)


def _decay(args: argparse.Namespace) -> Sequence[Finding]:
    from ring_mlx import load
    from ring_mlx.doctor import decay_choice
    from ring_mlx.doctor.decay_check import findings

    folder = options.find_model(args, args.check_decay)
    with bar_of(args, "loading the model") as bar:
        model, tokenizer = load(folder, decay_layer_offset=args.decay_layer_offset, progress=bar)
    with bar_of(args, "checking the decay", "texts") as bar:
        verdict = decay_choice.check(model, tokenizer, note, args.text, args.tokens, bar)
    found = findings(verdict, model.config.decay_layer_offset, args.check_decay)
    return [*found, decay_choice.write_choice(folder, verdict)] if args.write_decay else found
