"""``ring-mlx doctor``: whether this machine can run Ring models, and which decay a checkpoint was trained with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ring_mlx import options
from ring_mlx.cli.exit_codes import INTERRUPTED
from ring_mlx.cli.progress import bar_of
from ring_mlx.doctor import report
from ring_mlx.doctor.finding import PROBLEM, Finding, examine, table
from ring_mlx.errors import OptionError
from ring_mlx.options import group_of
from ring_mlx.system.terminal_text import for_output, harmless_json, note

HAS_PROBLEM = 1
# Options that need one of others.
NEEDS = {
    ("check-decay", "tune"): ("revision",),
    ("check-decay",): ("decay-layer-offset", "text", "tokens", "write-decay"),
    ("tune",): ("random", "tune-seconds"),
}
HELP = {
    "decay": "find the formula of the decay with which this model's weights were trained, instead of the checks",
    "text": "text file for --check-decay (long conversations of the demo suite)",
    "tokens": "the most tokens read under each formula (a minute's text, 1,024 to 16,384)",
    "tune": "time with a model (the toy) what is fast here, and keep the choices for models of its shapes, instead of the checks",
    "random": "random weights at the shapes of this model, for --tune",
    "report": "time this machine for some minutes, and write a report to send: JSON to FILE, and Markdown beside it",
    "seconds": "seconds for all choices of --tune; the length of command buffers takes up to a minute more (10)",
    "write": "write the formula to the model's config.json, if --check-decay finds one",
}


def add(parser: argparse.ArgumentParser) -> None:
    group_of(parser, "output").add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group_of(parser, "output").add_argument("--report", type=Path, metavar="FILE", help=HELP["report"])
    options.add_quiet_option(parser)
    t = parser.add_argument_group("tuning")
    t.add_argument("--tune", metavar="MODEL", nargs="?", const="", help=HELP["tune"])
    t.add_argument("--random", choices=options.RANDOM_SHAPES, help=HELP["random"])
    t.add_argument("--tune-seconds", type=options.positive_int, metavar="S", help=HELP["seconds"])
    d = parser.add_argument_group("decay")
    d.add_argument("--check-decay", metavar="MODEL", help=HELP["decay"])
    d.add_argument("--revision", help="branch, tag or commit of a hub repository")
    options.add_decay_option(d)
    d.add_argument("--text", type=Path, metavar="FILE", help=HELP["text"])
    d.add_argument("--tokens", type=options.positive_int, metavar="T", help=HELP["tokens"])
    d.add_argument("--write-decay", action="store_true", default=None, help=HELP["write"])


def check(args: argparse.Namespace) -> None:
    """Raises OptionError for options that exclude or need others."""
    tasks = [f"--{t}" for t in ("tune", "check-decay", "report") if getattr(args, t.replace("-", "_")) is not None]
    if len(tasks) > 1:
        raise OptionError(f"{' and '.join(tasks)} are tasks of their own; give one of them.")
    if args.report is not None and args.json:
        raise OptionError("--report writes JSON and --json prints it; leave one of them out.")
    if args.tune and args.random:
        raise OptionError(f"--random {args.random} makes its own weights; leave {args.tune!r} or --random out.")
    for needed, flags in NEEDS.items():
        for flag in flags:
            is_needed = all(getattr(args, n.replace("-", "_")) is None for n in needed)
            if is_needed and getattr(args, flag.replace("-", "_")) is not None:
                first = needed[0]
                raise OptionError(f"--{flag} is for --{first}; add --{first} MODEL, or leave --{flag} out.")


def run(args: argparse.Namespace) -> int:
    """Look and print; returns 1 if there is a problem."""
    if args.report is not None:
        return _report(args)
    found: Sequence[Finding]
    if args.tune is None and args.check_decay is None:
        with bar_of(args, "doctor", "checks") as bar:
            found = examine(bar)
    else:
        # Not at the top: a machine is examined where MLX cannot be imported.
        from ring_mlx.cli import doctor_model_command

        if args.tune is not None:
            return doctor_model_command.tune(args)
        found = doctor_model_command.check_decay(args)
    problems = sum(f.status == PROBLEM for f in found)
    if args.json:
        print(harmless_json({"problems": problems, "findings": [asdict(f) for f in found]}))
    else:
        print(for_output(table(found)))
    return HAS_PROBLEM if problems else 0


def _report(args: argparse.Namespace) -> int:
    beside = report.check_files(args.report)
    note(report.announcement())
    try:
        with bar_of(args, "report", "parts") as bar:
            made = report.make(args.report, bar)
    except KeyboardInterrupt:
        note(f"[doctor] interrupted; {args.report} and {beside} hold what was done.")
        return INTERRUPTED
    found = report.problems(made)
    for problem in found:
        note(f"[doctor] {problem}")
    print(
        for_output(f"{args.report} and {beside} are written, without names or folders; paste {beside} into an issue.")
    )
    return HAS_PROBLEM if found else 0
