"""``ring-mlx mlx-lm``: a command of mlx-lm, with our model where the checkpoint is one of ours."""

from __future__ import annotations

import argparse

from ring_mlx import mlx_lm_plugin


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="COMMAND", help="generate, server, lora, perplexity and so on")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments; try --help")


def run(args: argparse.Namespace) -> int:
    mlx_lm_plugin.run(args.name, args.arguments)
    return 0
