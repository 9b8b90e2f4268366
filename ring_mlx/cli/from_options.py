"""Makes from options what they name: a loaded model, a sampler, a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint import drafting
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path, load
from ring_mlx.cli.progress import bar_of
from ring_mlx.errors import OptionError
from ring_mlx.generation.decoding import LogitsProcessor, Sampler, prefill_step_or_default
from ring_mlx.generation.forms import Form, TextForm
from ring_mlx.generation.grammars import MOST_CHARACTERS
from ring_mlx.generation.sampling import start_sampling
from ring_mlx.generation.sampling_ranges import RANGES, OutOfRangeError
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.model.model import Model
from ring_mlx.options import loading_options, sampling_of
from ring_mlx.system.files import text_of
from ring_mlx.system.regular_files import parse_object
from ring_mlx.system.terminal_text import note, whole_text

TOY_NOTE = (
    "note: no --model given, so this is the packaged toy, good for trying commands only; for the real model give "
    "--model inclusionAI/Ring-mini-linear-2.0 or a folder."
)


def prefill_step_size(args: argparse.Namespace) -> int:
    """Prompt tokens a step, as asked or what suits the device."""
    return prefill_step_or_default(args.prefill_step_size)


def load_named(args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str]:
    """The model and tokenizer that the options name, and the model's name; a note says so when it is the toy."""
    name = _name_of(args)
    folder = find_model(args, name)
    with bar_of(args, "loading the model") as bar:
        model, tokenizer = load(folder, progress=bar, **loading_options(args))
    return model, tokenizer, name


def load_with_draft(args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str, Model | None]:
    """As `load_named`, and the model of --draft-model, if there is one."""
    if args.draft_model is None:
        return *load_named(args), None
    name = _name_of(args)
    folders = find_model(args, name), _find(args, args.draft_model, None)
    model, tokenizer, draft = drafting.load_with_draft(*folders, partial(bar_of, args), **loading_options(args))
    return model, tokenizer, name, draft


def form_of(args: argparse.Namespace) -> Form | None:
    """The form of the answer. Raises OptionError if a file cannot be read, or a schema is no JSON object."""
    if args.regex is not None:
        return Form(TextForm("regex", args.regex, "--regex"))
    if args.grammar is not None:
        is_text = "::=" in args.grammar or "start:" in args.grammar
        return Form(TextForm("grammar", args.grammar if is_text else _file_of(args.grammar, "--grammar"), "--grammar"))
    if args.json_schema is None:
        return None
    is_text = args.json_schema.lstrip().startswith("{")
    text = args.json_schema if is_text else _file_of(args.json_schema, "--json-schema")
    parse_object(text.encode(errors="replace"), "--json-schema", OptionError)
    return Form(TextForm("schema", text, "--json-schema"))


def _file_of(name: str, flag: str) -> str:
    try:
        return text_of(Path(name), 4 * MOST_CHARACTERS)
    except (OSError, ValueError) as e:
        raise OptionError(
            f"{flag} {name!r} cannot be read ({getattr(e, 'strerror', None) or e}); give a file."
        ) from None


def find_model(args: argparse.Namespace, name: str) -> Path:
    """The folder of a model; one of the hub's is downloaded, in the --revision."""
    return _find(args, name, args.revision)


def _find(args: argparse.Namespace, name: str, revision: str | None) -> Path:
    with bar_of(args, "downloading", "B") as bar:
        return resolve_model(name, revision, bar)


def _name_of(args: argparse.Namespace) -> str:
    """The model that is asked for; a note says so when it is the toy."""
    if args.model is None:
        note(TOY_NOTE)
    return str(args.model or demo_model_path())


def make_sampling(
    args: argparse.Namespace, model: Model, tokenizer: TokenizerWrapper
) -> tuple[Sampler, list[LogitsProcessor]]:
    """mlx-lm's sampler and processors from the options; seeds MLX with the seed given, or with one drawn."""
    vocabulary = model.config.vocab_size
    chosen = replace(sampling_of(args), logit_bias=logit_bias(args.logit_bias or {}, vocabulary))
    sampler, processors, _ = start_sampling(chosen, vocabulary, tokenizer, model.sampling)
    return sampler, processors


def make_kv_quantization(args: argparse.Namespace) -> KVQuantization | None:
    """The settings of --kv-bits, or None without it."""
    if args.kv_bits is None:
        return None
    return KVQuantization(args.kv_bits, args.kv_group_size, args.quantized_kv_start)


def read_prompt(text: str) -> str:
    r"""A prompt: ``-`` reads standard input, and ``\n`` and ``\t`` become a new line and a tab, as in mlx_lm."""
    if text != "-":
        return whole_text(text.replace("\\n", "\n").replace("\\t", "\t"))
    try:
        return whole_text(sys.stdin.read())
    except UnicodeDecodeError as e:
        raise OptionError(f"standard input is not UTF-8 text ({e}); pipe a text file.") from None


def logit_bias(given: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    """The value of --logit-bias with ids as keys."""
    bias = {}
    for key, value in given.items():
        if not key.isdecimal() or int(key[:20]) >= vocabulary:
            raise OptionError(f"--logit-bias key {key!r} is not a token id below {vocabulary}; give ids.")
        try:
            bias[int(key)] = RANGES["logit_bias"].check(value, f"--logit-bias {key}:")
        except OutOfRangeError as e:
            raise OptionError(f"{e}; give one.") from None
    return bias
