"""Options that several subcommands share: which model, how to sample, how to prefill."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_mlx.cli.parsing import group_of
from ring_mlx.cli.progress import bar_of
from ring_mlx.config_values import DECAY_OFFSETS
from ring_mlx.distributed.plan import AUTO, CHOICES
from ring_mlx.errors import OptionError
from ring_mlx.sampling_ranges import RANGES, OutOfRangeError
from ring_mlx.session_events import Sampling
from ring_mlx.surrogates import whole_text
from ring_mlx.terminal_text import note
from ring_mlx.thinking import STARTS, Thinking

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ring_mlx.generation import KVQuantization, LogitsProcessor, Sampler
    from ring_mlx.model import Model

RANDOM_SHAPES = ("mini", "flash", "mini-softmax", "flash-softmax", "golden")
TOY_NOTE = (
    "note: no --model given, so this is the packaged toy, good for trying commands only; for the real model give "
    "--model inclusionAI/Ring-mini-linear-2.0 or a folder."
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it computes."""
    g = group_of(parser, "model")
    g.add_argument("--model", help="folder of a checkpoint, or owner/name on the hub (default: the packaged toy)")
    g.add_argument("--revision", help="branch, tag or commit of a hub repository")
    g.add_argument(
        "--exact", action="store_true", help="residual stream, norms and head in float32 too: slower, more memory"
    )
    g.add_argument("--adapter-path", metavar="FOLDER", help="an adapter of mlx_lm.lora to put over the model")
    add_decay_option(g)


def add_tune_option(parser: argparse.ArgumentParser) -> None:
    """--no-tune, for a command that loads the model of --model."""
    if any("--model" in action.option_strings for action in parser._actions):
        about = "time nothing at the first load, and use nothing that was chosen so before"
        group_of(parser, "model").add_argument("--no-tune", action="store_true", help=about)


def add_decay_option(group: Any, about: str = "(what config.json says, else 0)") -> None:
    """Which of the decay's formulas holds, wherever a model is loaded or written."""
    words = "layers in the decay's formula: 0 (Ant's engines), -1 (the released Hugging Face file), clamped (mlx-lm)"
    group.add_argument("--decay-layer-offset", type=decay_offset, metavar="N", help=f"{words} {about}")


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """--quiet."""
    group_of(parser, "output").add_argument("--quiet", action="store_true", help="show no progress on standard error")


def add_expert_options(parser: argparse.ArgumentParser) -> None:
    """Routed experts that are read on demand."""
    g = group_of(parser, "model")
    g.add_argument(
        "--expert-cache-bytes",
        type=byte_count,
        metavar="N",
        help="read routed experts on demand into so much memory, such as 8GB (default: all in memory)",
    )
    g.add_argument(
        "--expert-policy", choices=("lru", "lfu", "none"), help="which experts --expert-cache-bytes keeps (lfu)"
    )


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    """How several processes share the model."""
    group_of(parser, "model").add_argument(
        "--distributed", choices=CHOICES, default=AUTO, help="how processes of `ring-mlx launch` share the model (auto)"
    )


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    """How answers start, and the room that a thought leaves."""
    g = group_of(parser, "answer")
    g.add_argument(
        "--thinking-start",
        choices=STARTS,
        default="auto",
        help="whether answers start within a thought: as prompt and text say, always, or never (auto)",
    )
    g.add_argument(
        "--answer-room",
        type=natural_int,
        metavar="N",
        help="close a thought that is open when only N tokens are left; 0 never does "
        "(a quarter of --max-tokens, at most 1024)",
    )


def thinking_of(args: argparse.Namespace) -> Thinking:
    """What `add_thinking_options` found."""
    return Thinking(args.thinking_start, args.answer_room)


STEP_HELP = "prompt tokens a step (2048 on a GPU, 128 on a CPU)"


def add_step_option(parser: argparse.ArgumentParser) -> None:
    """How much of a prompt is read at once."""
    group_of(parser, "memory").add_argument("--prefill-step-size", type=positive_int, help=STEP_HELP)


def add_prefill_options(parser: argparse.ArgumentParser) -> None:
    """Steps of the prefill and quantised keys and values."""
    add_step_option(parser)
    g = group_of(parser, "memory")
    g.add_argument("--kv-bits", type=int, help="quantise keys and values of softmax layers to 2, 4 or 8 bits")
    g.add_argument("--kv-group-size", type=int, default=64, help="group size of --kv-bits (64)")
    g.add_argument("--quantized-kv-start", type=natural_int, default=5000, help="tokens before --kv-bits begins (5000)")


def prefill_step_size(args: argparse.Namespace) -> int:
    """Prompt tokens a step, as asked or as the device likes it."""
    from ring_mlx.decoding import prefill_step_or_default

    return prefill_step_or_default(args.prefill_step_size)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The samplers and logits processors of mlx-lm, under its names."""
    g = group_of(parser, "sampling")
    for f in fields(Sampling):
        if f.name != "logit_bias":
            add_setting(g, f.name, f.default)
    g.add_argument("--logit-bias", type=json_object, help='JSON object of token id to bias, such as {"17": -5}')


def add_setting(group: Any, name: str, default: Any, *flags: str, about: str = "") -> None:
    """A flag for one of RANGES, whose words and values it has."""
    group.add_argument(
        f"--{name.replace('_', '-')}", *flags, type=RANGES[name].read, default=default, help=about or RANGES[name].about
    )


def check_template_flags(args: argparse.Namespace) -> None:
    """Refuse flags that speak to the chat template, where it is to be ignored.

    Raises:
        OptionError: Naming the first.
    """
    for flag in ("--system-prompt", "--prefill-response", "--chat-template-config"):
        if args.ignore_chat_template and getattr(args, flag[2:].replace("-", "_"), None) is not None:
            raise OptionError(f"{flag} needs the chat template; leave out {flag} or --ignore-chat-template.")


def load_named(args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str]:
    """The model and tokenizer that the options name, and what to call them; says so when it is the toy.

    Raises:
        RingError: As `ring_mlx.load`.
    """
    from ring_mlx.loading import demo_model_path, load

    if args.model is None:
        note(TOY_NOTE)
    name = args.model or str(demo_model_path())
    folder = find_model(args, name)
    with bar_of(args, "loading the model") as bar:
        model, tokenizer = load(folder, progress=bar, **loading_options(args))
    return model, tokenizer, name


def find_model(args: argparse.Namespace, name: str) -> Path:
    """The folder of a model, which is downloaded where it is the hub's.

    Raises:
        HubError: As `resolve_model`.
    """
    from ring_mlx.hub import resolve_model

    with bar_of(args, "downloading", "B") as bar:
        return resolve_model(name, args.revision, bar)


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_model_options` and perhaps `add_expert_options` found, as arguments of `ring_mlx.load_model`.

    Raises:
        OptionError: If only the policy is given.
    """
    cache_bytes, policy = getattr(args, "expert_cache_bytes", None), getattr(args, "expert_policy", None)
    if policy is not None and cache_bytes is None:
        raise OptionError(f"--expert-policy {policy} needs --expert-cache-bytes; add it, or leave the policy out.")
    return {
        "exact": args.exact,
        "adapter_path": args.adapter_path,
        "decay_layer_offset": args.decay_layer_offset,
        "expert_cache_bytes": cache_bytes,
        "expert_policy": policy,
    }


def make_sampling(
    args: argparse.Namespace, model: Model, tokenizer: TokenizerWrapper
) -> tuple[Sampler, list[LogitsProcessor]]:
    """mlx-lm's sampler and processors from the options; seeds MLX with the seed given, or with one drawn.

    Raises:
        OptionError: If a value does not suit the model's vocabulary.
    """
    from ring_mlx.sampling import start_sampling

    vocabulary = model.config.vocab_size
    names = (f.name for f in fields(Sampling) if f.name != "logit_bias")
    chosen = Sampling(**{n: getattr(args, n) for n in names}, logit_bias=logit_bias(args.logit_bias or {}, vocabulary))
    sampler, processors, _ = start_sampling(chosen, vocabulary, tokenizer, model.sampling)
    return sampler, processors


def make_kv_quantization(args: argparse.Namespace) -> KVQuantization | None:
    """The settings of --kv-bits, or None without it."""
    from ring_mlx.generation import KVQuantization

    if args.kv_bits is None:
        return None
    return KVQuantization(args.kv_bits, args.kv_group_size, args.quantized_kv_start)


def read_prompt(text: str) -> str:
    r"""A prompt as given: ``-`` is standard input, and ``\n`` and ``\t`` are what they name, as in mlx_lm.

    Raises:
        OptionError: If standard input is not text.
    """
    if text != "-":
        return whole_text(text.replace("\\n", "\n").replace("\\t", "\t"))
    try:
        return whole_text(sys.stdin.read())
    except UnicodeDecodeError as e:
        raise OptionError(f"standard input is not UTF-8 text ({e}); pipe a text file.") from None


def positive_int(text: str) -> int:
    """An argparse type: an integer from 1."""
    return _int_from(text, 1)


def natural_int(text: str) -> int:
    """An argparse type: an integer from 0."""
    return _int_from(text, 0)


def byte_count(text: str) -> int:
    """An argparse type: bytes, with a suffix KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB if wanted."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 8GB or 512MiB")
    power = 1 + "KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def decay_offset(text: str) -> int | str:
    """An argparse type: a key of DECAY_OFFSETS."""
    for value in DECAY_OFFSETS:
        if text == str(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(map(str, DECAY_OFFSETS))}")


def in_range(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def logit_bias(given: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    """The value of --logit-bias with ids as keys.

    Raises:
        OptionError: If a key is not the id of a token or a value not a number.
    """
    bias = {}
    for key, value in given.items():
        if not key.isdecimal() or int(key[:20]) >= vocabulary:
            raise OptionError(f"--logit-bias key {key!r} is not a token id below {vocabulary}; give ids.")
        try:
            bias[int(key)] = RANGES["logit_bias"].check(value, f"--logit-bias {key}:")
        except OutOfRangeError as e:
            raise OptionError(f"{e}; give one.") from None
    return bias


def _int_from(text: str, low: int) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is not {low} or more")
    return value
