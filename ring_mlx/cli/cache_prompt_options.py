"""The options of ``ring-mlx cache-prompt``."""

from __future__ import annotations

import argparse

from ring_mlx import options
from ring_mlx.options import group_of

check = options.check_template_flags


def add(parser: argparse.ArgumentParser) -> None:
    p = group_of(parser, "prompt")
    p.add_argument("--prompt", required=True, help="text to read; - reads standard input")
    p.add_argument("--prompt-cache-file", required=True, help="file to write")
    p.add_argument("--system-prompt", metavar="TEXT", help="system prompt for the chat template")
    p.add_argument("--ignore-chat-template", action="store_true", help="take the prompt as plain text")
    options.add_quiet_option(parser)
    options.add_model_options(parser)
    options.add_prefill_options(parser)
    options.add_store_options(parser)
