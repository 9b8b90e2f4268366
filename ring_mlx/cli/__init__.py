"""The ``ring-mlx`` command: finds the subcommand, runs it, and turns failures into one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from ring_mlx import __version__
from ring_mlx.errors import RingError
from ring_mlx.terminal_text import harmless, note

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS_GROUP = "ring_mlx.commands"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and exit."""
        self.exit(BAD_INPUT, harmless(f"{self.prog}: [option] {message}; see {self.prog} --help.\n"))


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand: those of this package, and those that other packages register.

    A front end registers a function ``add(subparsers)`` under the entry point group ``ring_mlx.commands``; this
    package never imports one by name.
    """
    from ring_mlx.cli import (
        bench_command,
        cache_command,
        cache_prompt_command,
        convert_command,
        doctor_command,
        eval_command,
        generate_command,
        launch_command,
        mlx_lm_command,
        serve_command,
    )

    parser = OneLineParser(prog="ring-mlx", description="Run Ring-linear 2.0 models with MLX.")
    parser.add_argument("--version", action="version", version=f"ring-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=OneLineParser)
    generate_command.add(commands)
    launch_command.add(commands)
    cache_prompt_command.add(commands)
    cache_command.add(commands)
    convert_command.add(commands)
    eval_command.add(commands)
    bench_command.add(commands)
    doctor_command.add(commands)
    mlx_lm_command.add(commands)
    serve_command.add(commands)
    for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda e: e.name):
        entry.load()(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ring-mlx`` and return its exit code: 0, 2 for bad input, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        code: int = args.run(args)
        return code
    except RingError as e:
        note(str(e))
        return BAD_INPUT
    except KeyboardInterrupt:
        note("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message))
