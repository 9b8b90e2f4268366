"""The options of ``ring-mlx agent``."""

from __future__ import annotations

import argparse

from ring_mlx.cli.agents import RECIPES

HELP = {
    "tool": "the agent: " + ", ".join(RECIPES),
    "url": "where the server is (http://127.0.0.1:8080)",
    "model": "which of the server's models or aliases (the first that it lists)",
    "api_key": "what the server was given; better in RING_MLX_API_KEY, which no list of processes shows",
    "run": "start the tool with this configuration, and with all words that follow; none of your files is changed",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tool", choices=[*RECIPES], help=HELP["tool"])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help=HELP["url"])
    parser.add_argument("--model", metavar="NAME", help=HELP["model"])
    parser.add_argument("--api-key", help=HELP["api_key"])
    parser.add_argument("--run", nargs=argparse.REMAINDER, dest="words", metavar="WORD", help=HELP["run"])
