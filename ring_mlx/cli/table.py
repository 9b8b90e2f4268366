"""The commands of ``ring-mlx``: what each is for, and the modules that are imported when it is chosen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ring_mlx.cli.parsing import add_command
from ring_mlx.cli.refused import add_refused
from ring_mlx.options import Command, add_tune_option
from ring_mlx.system.install import check_backend

ENTRY_POINTS = "ring_mlx.commands"
IN_ONE_FILE = ("mlx-lm", "cache", "doctor", "launch")  # options and work: the latter imports no MLX at its top
WITHOUT_MLX = ("agent", "cache", "doctor", "launch")


def _group(title: str, **commands: tuple[str, str]) -> list[Command]:
    """Commands of ours under a title of the help, each with a sentence about it and an example."""
    found = []
    for module, (about, example) in commands.items():
        name, work = module.replace("_", "-"), f"ring_mlx.cli.{module}_command"
        options = work if name in IN_ONE_FILE else f"ring_mlx.cli.{module}_options"
        found.append(Command(name, title, about, example, options, work, name not in WITHOUT_MLX))
    return found


OURS = [
    *_group(
        "ask a model",
        generate=(
            "Answer one prompt, with the flags of mlx_lm.generate.",
            'ring-mlx generate --prompt "What is 27 + 35?"',
        ),
        serve=(
            "Answer editors and agents on OpenAI's HTTP routes, several requests at once.",
            "ring-mlx serve --model inclusionAI/Ring-mini-linear-2.0 --port 8080",
        ),
        agent=(
            "Configure or start a coding agent with the model of a running server: opencode, codex, claude and others.",
            "ring-mlx agent opencode",
        ),
    ),
    *_group(
        "make and measure a model",
        convert=(
            "Convert a checkpoint to the mlx-community form: quantize, check, measure and upload it.",
            "ring-mlx convert --model inclusionAI/Ring-mini-linear-2.0 --mlx-path mini-q4 -q --quant-predicate ring-q4",
        ),
        eval=(
            "Measure how good a model is: questions, perplexity, divergence from another model, recall from long texts.",
            "ring-mlx eval --suite demo --limit 2",
        ),
        bench=(
            "Measure how fast a model runs here, compared with mlx-lm and with what the machine could do.",
            "ring-mlx bench -p 512 -g 32 -n 2",
        ),
        mlx_lm=(
            "Run a command of mlx-lm; it then loads Ring models too.",
            "ring-mlx mlx-lm perplexity --model ring-mini-q4",
        ),
    ),
    *_group(
        "reuse long prompts",
        cache_prompt=(
            "Read a long text once, and save the model's state for `generate --prompt-cache-file`.",
            "ring-mlx cache-prompt --prompt - --prompt-cache-file book.safetensors < book.txt",
        ),
        cache=("List and remove the snapshots of prompts on disk.", "ring-mlx cache info"),
    ),
    *_group(
        "machines",
        doctor=(
            "Say whether this machine can run Ring models, and which decay a checkpoint was trained with.",
            "ring-mlx doctor",
        ),
        launch=(
            "Run a command on several machines, or in several processes here, that share one model.",
            "ring-mlx launch --hosts mac1,mac2 generate --model inclusionAI/Ring-flash-linear-2.0 --prompt hello",
        ),
    ),
]


def commands_for(words: Sequence[str] | None) -> list[Command]:
    """The one command that a line starts with, if it is ours; else all, those of other packages first.

    Another package names a module under the entry point group ``ring_mlx.commands``, which has a `Command` as COMMAND.
    """
    ours = [c for c in OURS if words and c.name == words[0]]
    theirs = sorted(e.module for e in entry_points(group=ENTRY_POINTS))
    return ours or [*(import_module(name).COMMAND for name in theirs), *OURS]


def add(command: Command, commands: Any, is_chosen: bool) -> None:
    """Add a command to a parser, with its options if it is chosen."""
    parser = add_command(commands, command.name, command.about, command.example)
    if is_chosen:
        import_module(command.options).add(parser)
        add_refused(parser, command.name)
        add_tune_option(parser)
        parser.set_defaults(run=partial(_run, command))


def _run(command: Command, args: argparse.Namespace) -> int:
    """Refuse options that exclude each other, then do the work; returns the exit code."""
    check = getattr(import_module(command.options), "check", None)
    if check is not None:
        check(args)
    if command.needs_mlx:
        check_backend()
        _use_choices(args)
    code: int = import_module(command.work).run(args)
    return code


def _use_choices(args: argparse.Namespace) -> None:
    """Before MLX makes its device, which reads some of them."""
    # Not at the top: commands that need no MLX must run without it.
    from metal_kernels import choices
    from ring_mlx.tuning import buffers

    if getattr(args, "no_tune", False):
        os.environ[choices.SWITCH] = "off"
    buffers.use_stored()
