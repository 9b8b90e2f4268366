"""``ring-mlx chat``: conversations in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ring_mlx import RingError, byte_count, harmless

EXPERTS = "read routed experts on demand into so much memory, such as 8GB (default: all in memory)"
UNSAVED = 2  # exit code
SAMPLING = ("temp", "top_p", "top_k", "min_p", "max_tokens", "thinking_budget", "seed")


class NoTerminalError(RingError):
    """The chat was started where nobody can see it or type."""

    origin = "option"


def add(commands: Any) -> None:
    """Add the subcommand; registered under the entry point group ``ring_mlx.commands``."""
    parser = commands.add_parser("chat", help="chat in the terminal", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (default: the packaged toy)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--expert-cache-bytes", type=byte_count, metavar="N", help=EXPERTS)
    parser.add_argument("--max-tokens", "-m", type=_from(int, 1), help="at most so many an answer (2048)")
    parser.add_argument("--temp", type=_from(float, 0), help="temperature; 0 is greedy (0.6)")
    parser.add_argument("--top-p", type=_from(float, 0, 1), help="nucleus probability (1)")
    parser.add_argument("--top-k", type=_from(int, 0), help="only the k likeliest; 0 is all (0)")
    parser.add_argument("--min-p", type=_from(float, 0, 1), help="least probability, relative to the best (0)")
    parser.add_argument("--seed", type=_from(int, 0, 2**32 - 1), help="repeats an answer")
    parser.add_argument("--system-prompt", help="system prompt for the chat template")
    parser.add_argument("--thinking-budget", type=_from(int, 0), help="close the thought after so many tokens")
    parser.add_argument("--resume", action="store_true", help="go on with the latest chat")
    parser.add_argument("--plain", action="store_true", help="line by line, for dumb terminals and pipes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Open the chat; returns the exit code.

    Raises:
        NoTerminalError: If standard input, output or error (on which Textual draws) is not a terminal, which only
            ``--plain`` can do without.
    """
    if not args.plain and not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise NoTerminalError("chat needs a terminal; use ring-mlx chat --plain or ring-mlx generate")
    from tui import config, paths
    from tui.engine import Engine
    from tui.keeper import Keeper
    from tui.messages import ModelChoice

    settings, wrong = config.load(paths.config_file())
    settings = with_options(settings, args)
    notes = [wrong] if wrong else []
    engine = Engine(ModelChoice(settings.model or None, args.revision, args.expert_cache_bytes))
    keeper = Keeper(paths.data_file("chats.db"), notes.append, make_room=_free_disk)
    talk = keeper.latest() if args.resume else None
    try:
        if args.plain:
            from tui.plain import Plain

            code = Plain(engine, keeper, settings, talk, notes).run()
        else:
            from tui.app import RingChat

            app = RingChat(engine, keeper, settings, talk, notes)
            keeper.tell_with(app.tell)
            with warnings.catch_warnings():  # a screen hides what is printed
                warnings.showwarning = app.show_warning
                app.run()
            code = app.return_code or 0
    finally:
        is_at_rest = engine.close()
        is_saved = keeper.close()
    if not is_saved:
        code = code or UNSAVED
        for line in keeper.report():
            print(f"ring-mlx: {harmless(line)}", file=sys.stderr)
    sys.stdout.flush()
    if not is_at_rest:
        os._exit(code)  # still loading: an ordinary exit would wait for it or abort
    return code


def _free_disk(nbytes: int) -> int:
    """Let snapshots give way to the chat: they can be made again."""
    from ring_mlx import free_disk
    from tui import paths

    near = paths.data_file("chats.db")
    return free_disk(nbytes, near if near.exists() else near.parent, paths.snapshots())


def with_options(config: Any, args: argparse.Namespace) -> Any:
    """The configuration, in which the command line's options come first."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    config = replace(config, sampling=replace(config.sampling, **given))
    if args.system_prompt is not None:
        config = replace(config, system_prompt=args.system_prompt)
    return replace(config, model=args.model) if args.model else config


def _from(kind: type[int | float], low: float, high: float = 1e6) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number
