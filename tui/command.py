"""``ring-mlx chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from ring_mlx import RingError


class NoTerminalError(RingError):
    """The chat was started where nobody can see it or type."""

    origin = "option"


def add(commands: Any) -> None:
    """Add the subcommand; registered under the entry point group ``ring_mlx.commands``."""
    parser = commands.add_parser("chat", help="chat in the terminal", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (default: the packaged toy)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--max-tokens", "-m", type=_from(int, 1), default=2048, help="at most so many an answer (2048)")
    parser.add_argument("--temp", type=_from(float, 0), default=0.6, help="temperature; 0 is greedy (0.6)")
    parser.add_argument("--top-p", type=_from(float, 0, 1), default=1.0, help="nucleus probability (1)")
    parser.add_argument("--system-prompt", help="system prompt for the chat template")
    parser.add_argument("--thinking-budget", type=_from(int, 0), help="close the thought after so many tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Open the chat; returns the exit code.

    Raises:
        NoTerminalError: If standard input or output is not a terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise NoTerminalError("chat needs a terminal; use ring-mlx generate")
    from tui.app import RingChat
    from tui.engine import Engine, Settings

    fields = ("model", "revision", "max_tokens", "temp", "top_p", "system_prompt", "thinking_budget")
    engine = Engine(Settings(**{name: getattr(args, name) for name in fields}))
    app = RingChat(engine)
    try:
        app.run()
    finally:
        is_at_rest = engine.close()
    code = app.return_code or 0
    if not is_at_rest:
        os._exit(code)  # still loading: an ordinary exit would wait for it or abort
    return code


def _from(kind: type[int | float], low: float, high: float = 1e6) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number
