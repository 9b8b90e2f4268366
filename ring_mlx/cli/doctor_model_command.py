"""The parts of ``ring-mlx doctor`` that load a model: checking its decay, and timing what is fast with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ring_mlx.checkpoint.loading import load
from ring_mlx.cli.from_options import find_model
from ring_mlx.cli.progress import bar_of
from ring_mlx.doctor import decay_choice, tuning
from ring_mlx.doctor.decay_check import findings
from ring_mlx.doctor.finding import Finding
from ring_mlx.system.terminal_text import for_output, harmless_json, note
from ring_mlx.tuning import table


def tune(args: argparse.Namespace) -> int:
    """Time what is fast here and print it; returns the exit code."""
    with bar_of(args, "tuning") as bar:
        found = tuning.tune(find_model(args, args.tune) if args.tune else None, args.random, args.tune_seconds, bar)
    print(harmless_json(found.as_dict()) if args.json else for_output(table.text(found)))
    return 0


def check_decay(args: argparse.Namespace) -> Sequence[Finding]:
    """Which formula of the decay a model was trained with."""
    folder = find_model(args, args.check_decay)
    with bar_of(args, "loading the model") as bar:
        model, tokenizer = load(folder, decay_layer_offset=args.decay_layer_offset, progress=bar)
    with bar_of(args, "checking the decay", "texts") as bar:
        verdict = decay_choice.check(model, tokenizer, note, args.text, args.tokens, bar)
    found = findings(verdict, model.config.decay_layer_offset, args.check_decay)
    return [*found, decay_choice.write_choice(folder, verdict)] if args.write_decay else found
