"""The commands of ``ring-mlx``: what each is for, and the modules that are imported when it is chosen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from ring_mlx.cli.options import add_tune_option
from ring_mlx.cli.parsing import add_command
from ring_mlx.cli.refused import add_refused
from ring_mlx.system.install import check_backend

ENTRY_POINTS = "ring_mlx.commands"
ASK, MAKE, REUSE, MACHINES = "ask a model", "make and measure a model", "reuse long prompts", "machines"


class Command(NamedTuple):
    """One command.

    Args:
        name: As it is typed.
        group: The title under which help lists it.
        about: What it does, in a sentence.
        example: A line that can be typed as it is.
        options: A module with ``add(parser)``, and with ``check(args)`` if some options exclude others.
        work: A module with ``run(args)``, which returns the exit code. It is imported once the options are good.
        needs_mlx: Whether to stop before the work where MLX is not installed.
    """

    name: str
    group: str
    about: str
    example: str
    options: str
    work: str
    needs_mlx: bool = True

    def add(self, commands: Any, is_chosen: bool) -> None:
        """Add it to a parser, with its options if it is chosen."""
        parser = add_command(commands, self.name, self.about, self.example)
        if is_chosen:
            import_module(self.options).add(parser)
            add_refused(parser, self.name)
            add_tune_option(parser)
            parser.set_defaults(run=self.run)

    def run(self, args: argparse.Namespace) -> int:
        """Refuse options that exclude each other, then do the work; returns the exit code."""
        check = getattr(import_module(self.options), "check", None)
        if check is not None:
            check(args)
        if self.needs_mlx:
            check_backend()
            _use_choices(args)
        code: int = import_module(self.work).run(args)
        return code


def _use_choices(args: argparse.Namespace) -> None:
    """Before MLX makes its device, which reads some of them."""
    # Not at the top: commands that need no MLX must run without it.
    from metal_kernels import choices
    from ring_mlx.tuning import buffers

    if getattr(args, "no_tune", False):
        os.environ[choices.SWITCH] = "off"
    buffers.use_stored()


def _command(name: str, group: str, about: str, example: str, is_light: bool = False) -> Command:
    """One of ours. The work of a light command imports no MLX, so its options are in the same module."""
    module = name.replace("-", "_")
    work = f"ring_mlx.cli.{module}_command"
    return Command(
        name, group, about, example, work if is_light else f"ring_mlx.cli.options.{module}", work, not is_light
    )


OURS = (
    _command(
        "generate",
        ASK,
        "Answer one prompt, with the flags of mlx_lm.generate.",
        'ring-mlx generate --prompt "What is 27 + 35?"',
    ),
    _command(
        "serve",
        ASK,
        "Answer editors and agents on OpenAI's HTTP routes, several requests at once.",
        "ring-mlx serve --model inclusionAI/Ring-mini-linear-2.0 --port 8080",
    ),
    _command(
        "convert",
        MAKE,
        "Convert a checkpoint to the mlx-community form: quantise, check, measure and upload it.",
        "ring-mlx convert --model inclusionAI/Ring-mini-linear-2.0 --mlx-path ring-mini-q4 -q --quant-predicate ring-q4",
    ),
    _command(
        "eval",
        MAKE,
        "Measure how good a model is: questions, perplexity, divergence from another model, recall from long texts.",
        "ring-mlx eval --suite demo --limit 2",
    ),
    _command(
        "bench",
        MAKE,
        "Measure how fast a model runs here, beside mlx-lm and beside what the machine could do.",
        "ring-mlx bench -p 512 -g 32 -n 2",
    ),
    _command(
        "mlx-lm",
        MAKE,
        "Run a command of mlx-lm, with our model where the checkpoint is one of ours.",
        "ring-mlx mlx-lm perplexity --model ring-mini-q4",
    ),
    _command(
        "cache-prompt",
        REUSE,
        "Read a long text once and keep the model's state for `ring-mlx generate --prompt-cache-file`.",
        "ring-mlx cache-prompt --prompt - --prompt-cache-file book.safetensors < book.txt",
    ),
    _command("cache", REUSE, "List and prune the snapshots of prompts on disk.", "ring-mlx cache info", is_light=True),
    _command(
        "doctor",
        MACHINES,
        "Say whether this machine can run Ring models, and which decay a checkpoint was trained with.",
        "ring-mlx doctor",
        is_light=True,
    ),
    _command(
        "launch",
        MACHINES,
        "Run one command on several machines, or in several processes here, that share a model.",
        "ring-mlx launch --hosts mac1,mac2 generate --model inclusionAI/Ring-flash-linear-2.0 --prompt hello",
        is_light=True,
    ),
)


def commands_for(words: Sequence[str] | None) -> list[Command]:
    """The one command that a line starts with, if it is ours; else all, those of other packages first.

    Another package names a module under the entry point group ``ring_mlx.commands``, which has a `Command` as COMMAND.
    """
    ours = [c for c in OURS if words and c.name == words[0]]
    theirs = sorted(e.module for e in entry_points(group=ENTRY_POINTS))
    return ours or [*(import_module(name).COMMAND for name in theirs), *OURS]
