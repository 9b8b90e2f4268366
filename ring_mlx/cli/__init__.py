"""The ``ring-mlx`` command: finds the subcommand, runs it, and turns failures into one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from ring_mlx import __version__
from ring_mlx.cli import streams
from ring_mlx.cli.exit_codes import BAD_INPUT, BROKEN_PIPE, INTERRUPTED
from ring_mlx.cli.parsing import OneLineParser
from ring_mlx.cli.refused import add_refused
from ring_mlx.errors import RingError
from ring_mlx.install import check_backend, explained
from ring_mlx.machine_fit import unfit
from ring_mlx.terminal_text import note

WITHOUT_MLX = ("doctor", "cache", "launch")
COMMANDS_GROUP = "ring_mlx.commands"
FIRST = """\
ring-mlx runs Ring-linear 2.0 models. Try first:

  ring-mlx chat
      a chat with the toy that comes with it: it adds, sorts and spells, and needs no network
  ring-mlx generate --prompt "What is 27 + 35?"
      one answer of the toy
  ring-mlx doctor
      what this machine can run, and what it lacks
  ring-mlx chat --model mlx-community/Ring-mini-linear-2.0-4bit
      the real model in 4 bits, which is fetched once (8.6 GB)

ring-mlx --help lists all commands, ring-mlx COMMAND --help the options of one.
"""


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
        options,
        serve_command,
    )

    parser = OneLineParser(
        prog="ring-mlx",
        description="Run Ring-linear 2.0 models with MLX.",
        epilog="ring-mlx COMMAND --help lists the options of one, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"ring-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog=parser.prog)
    for entry in sorted(entry_points(group=COMMANDS_GROUP), key=lambda e: e.name):
        entry.load()(commands)
    generate_command.add(commands)
    serve_command.add(commands)
    convert_command.add(commands)
    doctor_command.add(commands)
    eval_command.add(commands)
    bench_command.add(commands)
    cache_prompt_command.add(commands)
    cache_command.add(commands)
    launch_command.add(commands)
    mlx_lm_command.add(commands)
    for name, command in commands.choices.items():
        add_refused(command, name)
        options.add_tune_option(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ring-mlx`` and return its exit code.

    It is 0, 2 for bad input, 4 for an answer cut off, 130 when interrupted, 141 when nobody reads.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    streams.replace_closed()
    if reason := unfit():
        note(str(reason))
        return BAD_INPUT
    try:
        return _run(argv)
    except ImportError as e:
        note(str(explained(e)))
        return BAD_INPUT
    except RingError as e:
        note(str(e))
        return BAD_INPUT
    except KeyboardInterrupt:
        note("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as e:
        where = "standard output, or a file," if e.filename is None else e.filename
        note(f"[file] {where} could not be read or written ({e.strerror or e}); check space and permissions.")
        return BAD_INPUT
    finally:
        streams.give_up_unwritable()


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # The help may be cut, too.
        raise
    code: int = 0
    if args.command is None:
        print(FIRST, end="")
    else:
        if args.command not in WITHOUT_MLX:
            check_backend()
            _use_choices(args)
        code = args.run(args)
    sys.stdout.flush()
    return code


def _use_choices(args: argparse.Namespace) -> None:
    """Before MLX makes its device, which reads some of them."""
    from metal_kernels import choices
    from ring_mlx.tuning import buffers

    if getattr(args, "no_tune", False):
        os.environ[choices.SWITCH] = "off"
    buffers.use_stored()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message))
