"""``ring-mlx chat`` as a command, and its options; named under the entry point group ``ring_mlx.commands``."""

from __future__ import annotations

import argparse
import sys

from ring_mlx import (
    Command,
    RingError,
    add_decay_option,
    add_step_option,
    add_thinking_options,
    byte_count,
    value_range,
)
from tui.commands import SETTINGS

EXPERTS = "read routed experts on demand into this much memory, such as 8GB (default: all in memory)"
COMMAND = Command(
    "chat",
    "ask a model",
    "Chat in the terminal; chats are kept and can be searched.",
    "ring-mlx chat --resume",
    __name__,
    "tui.chat",
)


class NoTerminalError(RingError):
    """The chat was started without a terminal to show it or to type in."""

    origin = "option"


def add(parser: argparse.ArgumentParser) -> None:
    c = parser.add_argument_group("chat")
    c.add_argument("--resume", action="store_true", help="go on with the latest chat")
    c.add_argument("--plain", action="store_true", help="line by line, for dumb terminals and pipes")
    c.add_argument("--system-prompt", metavar="TEXT", help="system prompt for the chat template")
    m = parser.add_argument_group("model")
    m.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (default: the packaged toy)")
    m.add_argument("--revision", help="branch, tag or commit of a hub repository")
    m.add_argument("--adapter-path", metavar="FOLDER", help="an adapter of mlx_lm.lora for the model")
    add_decay_option(m)
    m.add_argument("--expert-cache-bytes", type=byte_count, metavar="N", help=EXPERTS)
    a = parser.add_argument_group("answer")
    for name in SETTINGS:
        flags = [f"--{name.replace('_', '-')}", *(["-m"] if name == "max_tokens" else [])]
        a.add_argument(*flags, type=value_range(name).read, help=value_range(name).about)
    add_thinking_options(parser)
    add_step_option(parser)


def check(args: argparse.Namespace) -> None:
    """Raises NoTerminalError if a stream is not a terminal; Textual draws on standard error. ``--plain`` needs none."""
    if not args.plain and not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise NoTerminalError("chat needs a terminal; use ring-mlx chat --plain or ring-mlx generate")
