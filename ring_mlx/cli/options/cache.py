"""The options of ``ring-mlx cache``."""

from __future__ import annotations

import argparse

from ring_mlx.cli import options
from ring_mlx.cli.parsing import add_command
from ring_mlx.errors import OptionError


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, prog=parser.prog)
    for name, text, more in (
        ("info", "Say where the snapshots are and how much room they take.", ""),
        ("list", "List every snapshot, the one used last first.", " --json"),
        ("prune", "Remove snapshots, and files that belong to none.", " --unused-days 30"),
    ):
        action = add_command(actions, name, text, f"ring-mlx cache {name}{more}")
        action.add_argument("--cache-dir", help="folder of the snapshots (default: the system's, or RING_MLX_CACHE)")
        action.add_argument("--model", help="only the model whose name or fingerprint starts so")
        if name != "prune":
            action.add_argument("--json", action="store_true", help="print JSON instead of text")
            continue
        action.add_argument(
            "--max-size", type=options.byte_count, help="keep at most so much for each model, such as 500MB"
        )
        action.add_argument("--unused-days", type=options.in_range(0, 1e6), help="remove what was not used for so long")
        action.add_argument("--all", action="store_true", help="remove everything")


def check(args: argparse.Namespace) -> None:
    """Raises OptionError where options exclude each other."""
    if args.action == "prune" and args.all and (args.max_size is not None or args.unused_days is not None):
        raise OptionError("--all leaves nothing that --max-size or --unused-days could keep; give one of them.")
