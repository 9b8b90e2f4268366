"""The ``ring-mlx`` command: finds the subcommand, runs it, and turns failures into one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ring_mlx import __version__
from ring_mlx.cli import streams, table
from ring_mlx.cli.exit_codes import BAD_INPUT, BROKEN_PIPE, INTERRUPTED
from ring_mlx.cli.parsing import OneLineParser, in_groups
from ring_mlx.errors import RingError
from ring_mlx.system.install import explained
from ring_mlx.system.machine_fit import unfit
from ring_mlx.system.terminal_text import note

FIRST = """\
ring-mlx runs Ring-linear 2.0 models. Try first:

  ring-mlx chat
      a chat with the packaged toy, which adds, sorts and spells, and needs no network
  ring-mlx generate --prompt "What is 27 + 35?"
      one answer of the toy
  ring-mlx doctor
      what this machine can run, and what is missing
  ring-mlx chat --model mlx-community/Ring-mini-linear-2.0-4bit
      the real model in 4 bits, which is downloaded once (8.6 GB)

ring-mlx --help lists all commands, ring-mlx COMMAND --help the options of one.
"""


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser for a command line, with the options of the command that it names, or of all without a line."""
    parser = OneLineParser(
        prog="ring-mlx",
        description="Run Ring-linear 2.0 models with MLX.",
        epilog="ring-mlx COMMAND --help lists the options of one, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"ring-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog=parser.prog)
    listed = table.commands_for(words)
    for command in listed:
        table.add(command, commands, words is None or command.name in words)
    in_groups(parser, commands, {c.name: c.group for c in listed})
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ring-mlx`` and return its exit code: 0 or one of `ring_mlx.cli.exit_codes`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    streams.replace_closed()
    if reason := unfit():
        note(str(reason))
        return BAD_INPUT
    try:
        return _run(sys.argv[1:] if argv is None else argv)
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


def _run(words: Sequence[str]) -> int:
    code: int = 0
    if words:
        try:
            args = build_parser(words).parse_args(words)
        except SystemExit:
            sys.stdout.flush()  # the reader of help may be gone too
            raise
        code = args.run(args)
    else:
        print(FIRST, end="")
    sys.stdout.flush()
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message))
