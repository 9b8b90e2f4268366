"""``ring-mlx mlx-lm``: a command of mlx-lm, with our model where the checkpoint is one of ours."""

from __future__ import annotations

import argparse
from typing import Any

from ring_mlx.cli.parsing import add_command


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "mlx-lm",
        "a command of mlx-lm, with our model in it",
        "A command of mlx-lm, with our model where the checkpoint is one of ours.",
        "ring-mlx mlx-lm perplexity --model ring-mini-q4",
    )
    parser.add_argument("name", metavar="COMMAND", help="generate, server, lora, perplexity and so on")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments; try --help")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from ring_mlx import mlx_lm_plugin

    mlx_lm_plugin.run(args.name, args.arguments)
    return 0
