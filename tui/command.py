"""``ring-mlx chat`` as a command, and its options; named under the entry point group ``ring_mlx.commands``."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from ring_mlx import (
    Command,
    RingError,
    add_decay_option,
    add_draft_option,
    add_speculate_option,
    add_step_option,
    add_thinking_options,
    byte_count,
    value_range,
)
from tui.commands import SETTINGS

EXPERTS = "read routed experts on demand into this much memory, such as 8GB (default: all in memory)"
SERVES = "textual_serve"  # the package of the extra "web"
PAGE = "TEXTUAL_DRIVER"  # in the environment of the process that a page shows
COMMAND = Command(
    "chat",
    "ask a model",
    "Chat in the terminal; chats are kept and can be searched.",
    "ring-mlx chat --resume",
    __name__,
    "tui.chat",
)


class WebError(RingError):
    """An option of a page is wrong."""

    origin = "option"


class NoTerminalError(RingError):
    """The chat was started without a terminal to show it or to type in."""

    origin = "option"


def add(parser: argparse.ArgumentParser) -> None:
    c = parser.add_argument_group("chat")
    c.add_argument("--resume", action="store_true", help="go on with the latest chat")
    c.add_argument("--plain", action="store_true", help="line by line, for dumb terminals and pipes")
    c.add_argument("--web", action="store_true", help="in a browser on this machine; needs textual-serve")
    c.add_argument("--port", type=int, metavar="N", help="of --web's address (default: a free one)")
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
    add_speculate_option(parser)
    add_draft_option(a)
    add_step_option(parser)


def check(args: argparse.Namespace) -> None:
    """Raises WebError, ImportError, or NoTerminalError if a stream is not a terminal.

    Textual draws on standard error. ``--plain`` needs no terminal, and a page neither.
    """
    if args.web and find_spec(SERVES) is None:
        raise ModuleNotFoundError(SERVES, name=SERVES)
    if args.web and args.plain:
        raise WebError("--web has screens and --plain has none; leave one out.")
    if args.port is not None and not (args.web and 0 <= args.port < 1 << 16):
        raise WebError(f"--port {args.port} is no port of --web; give --web and a number up to 65535.")
    if not (args.plain or args.web or PAGE in os.environ) and not all(
        stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)
    ):
        raise NoTerminalError("chat needs a terminal; use ring-mlx chat --plain or ring-mlx generate")
