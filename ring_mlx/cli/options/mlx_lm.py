"""The options of ``ring-mlx mlx-lm``."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("name", metavar="COMMAND", help="generate, server, lora, perplexity and so on")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments; try --help")
