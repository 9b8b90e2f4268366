"""``ring-mlx chat``: conversations in the terminal."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

from ring_mlx import (
    RingError,
    add_command,
    add_decay_option,
    add_step_option,
    add_thinking_options,
    byte_count,
    harmless,
    thinking_of,
    value_range,
)
from tui.commands import SETTINGS

EXPERTS = "read routed experts on demand into so much memory, such as 8GB (default: all in memory)"
UNSAVED = 2  # exit code


class NoTerminalError(RingError):
    """The chat was started where nobody can see it or type."""

    origin = "option"


def add(commands: Any) -> None:
    """Add the subcommand; registered under the entry point group ``ring_mlx.commands``."""
    parser = add_command(
        commands, "chat", "conversations in the terminal", "Conversations in the terminal.", "ring-mlx chat --resume"
    )
    c = parser.add_argument_group("chat")
    c.add_argument("--resume", action="store_true", help="go on with the latest chat")
    c.add_argument("--plain", action="store_true", help="line by line, for dumb terminals and pipes")
    c.add_argument("--system-prompt", metavar="TEXT", help="system prompt for the chat template")
    m = parser.add_argument_group("model")
    m.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (default: the packaged toy)")
    m.add_argument("--revision", help="branch, tag or commit of a hub repository")
    m.add_argument("--adapter-path", metavar="FOLDER", help="an adapter of mlx_lm.lora to put over the model")
    add_decay_option(m)
    m.add_argument("--expert-cache-bytes", type=byte_count, metavar="N", help=EXPERTS)
    a = parser.add_argument_group("answer")
    for name in SETTINGS:
        flags = [f"--{name.replace('_', '-')}", *(["-m"] if name == "max_tokens" else [])]
        a.add_argument(*flags, type=value_range(name).read, help=value_range(name).about)
    add_thinking_options(parser)
    add_step_option(parser)
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
    choice = ModelChoice(
        settings.model or None,
        args.revision,
        args.adapter_path,
        args.expert_cache_bytes,
        thinking_of(args),
        args.prefill_step_size,
        args.decay_layer_offset,
    )
    engine = Engine(choice)
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
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    config = replace(config, sampling=replace(config.sampling, **given))
    if args.system_prompt is not None:
        config = replace(config, system_prompt=args.system_prompt)
    return replace(config, model=args.model) if args.model else config
