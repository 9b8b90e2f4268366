"""What commands of ``ring-mlx`` share, those of other packages too: their entry in the list, and common options."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ring_mlx.distributed import AUTO, CHOICES
from ring_mlx.engine.events import Sampling
from ring_mlx.errors import OptionError
from ring_mlx.generation.draft_sources import SPECULATIONS, check_speculation
from ring_mlx.generation.sampling_ranges import RANGES
from ring_mlx.generation.thinking import STARTS, Thinking
from ring_mlx.model.config_values import DECAY_OFFSETS

RANDOM_SHAPES = ("mini", "flash", "mini-softmax", "flash-softmax", "golden")


class Command(NamedTuple):
    """A command's entry in the list of all."""

    name: str
    group: str  # the title under which help lists it
    about: str  # a sentence
    example: str  # a line that can be typed
    options: str  # a module with add(parser), and check(args) if some options exclude others
    work: str  # a module with run(args), which returns the exit code; imported once the options are good
    needs_mlx: bool = True


def group_of(parser: argparse.ArgumentParser, title: str) -> Any:
    """The group of options with this title, made if there is none yet."""
    found = (g for g in parser._action_groups if g.title == title)
    return next(found, None) or parser.add_argument_group(title)


MODEL = "folder of a checkpoint, or owner/name on the hub (default: the packaged toy)"


def add_model_options(
    parser: argparse.ArgumentParser, action: str | type[argparse.Action] = "store", about: str = MODEL
) -> None:
    g = group_of(parser, "model")
    g.add_argument("--model", action=action, help=about)
    g.add_argument("--revision", help="branch, tag or commit of a hub repository")
    g.add_argument(
        "--exact", action="store_true", help="residual stream, norms and head in float32 too: slower, more memory"
    )
    g.add_argument("--adapter-path", metavar="FOLDER", help="an adapter of mlx_lm.lora for the model")
    add_decay_option(g)


def add_tune_option(parser: argparse.ArgumentParser) -> None:
    """--no-tune, for a command with --model."""
    if any("--model" in action.option_strings for action in parser._actions):
        about = "time nothing at the first load, and ignore earlier choices of kernels and sizes"
        group_of(parser, "model").add_argument("--no-tune", action="store_true", help=about)


def add_decay_option(group: Any, about: str = "(config.json's, else 0)") -> None:
    """Which formula of the decay to use."""
    words = "the layer's number in the formula of the decay: 0 (Ant's engines), -1 (the released Hugging Face file), clamped (mlx-lm)"
    group.add_argument("--decay-layer-offset", type=decay_offset, metavar="N", help=f"{words} {about}")


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    group_of(parser, "output").add_argument("--quiet", action="store_true", help="show no progress on standard error")


def add_expert_options(parser: argparse.ArgumentParser) -> None:
    """Options for routed experts that are read on demand."""
    g = group_of(parser, "model")
    about = "read routed experts on demand into this much memory, such as 8GB (default: all in memory)"
    g.add_argument("--expert-cache-bytes", type=byte_count, metavar="N", help=about)
    g.add_argument("--expert-policy", choices=("lfu", "none"), help="which experts --expert-cache-bytes keeps (lfu)")


def add_draft_option(group: Any) -> None:
    """--draft-model."""
    about = "a smaller model with the same tokens, which drafts for --speculate: a folder, or owner/name on the hub"
    group.add_argument("--draft-model", metavar="MODEL", help=about)


def add_distributed_option(parser: argparse.ArgumentParser) -> None:
    group_of(parser, "model").add_argument(
        "--distributed", choices=CHOICES, default=AUTO, help="how processes of `ring-mlx launch` share the model (auto)"
    )


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    """Whether answers start with a thought, and the tokens that are kept for the answer."""
    g = group_of(parser, "answer")
    start = "whether answers start inside a thought: found from prompt and text, always, or never (auto)"
    g.add_argument("--thinking-start", choices=STARTS, default="auto", help=start)
    room = "close a thought that is still open when only N tokens are left; 0 never does (a quarter of --max-tokens, at most 1024)"
    g.add_argument("--answer-room", type=natural_int, metavar="N", help=room)


def thinking_of(args: argparse.Namespace) -> Thinking:
    """The values of `add_thinking_options`."""
    return Thinking(args.thinking_start, args.answer_room)


def add_speculate_option(parser: argparse.ArgumentParser) -> None:
    """Several tokens a step; None where nothing is given, which is auto where that can be."""
    about = "read up to N tokens, drafted from earlier text, in one step; auto: where that is faster (auto)"
    group_of(parser, "answer").add_argument("--speculate", type=speculation, metavar="{off,auto,N}", help=about)


STEP_HELP = "prompt tokens per step (2048 on a GPU, 128 on a CPU)"


def add_step_option(parser: argparse.ArgumentParser) -> None:
    """--prefill-step-size."""
    group_of(parser, "memory").add_argument("--prefill-step-size", type=positive_int, help=STEP_HELP)


def add_prefill_options(parser: argparse.ArgumentParser) -> None:
    """Steps of the prefill and quantized keys and values."""
    add_step_option(parser)
    g = group_of(parser, "memory")
    g.add_argument("--kv-bits", type=int, help="quantize keys and values of softmax layers to 2, 4 or 8 bits")
    g.add_argument("--kv-group-size", type=int, default=64, help="group size of --kv-bits (64)")
    g.add_argument("--quantized-kv-start", type=natural_int, default=5000, help="tokens before it begins (5000)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The samplers and logits processors of mlx-lm, under its names."""
    g = group_of(parser, "sampling")
    add_sampling_settings(g)
    g.add_argument("--logit-bias", type=json_object, help='JSON object of token ids and biases, such as {"17": -5}')


def add_sampling_settings(group: Any) -> None:
    """Those of `add_sampling_options` that are a number."""
    for f in fields(Sampling):
        if f.name != "logit_bias":
            add_setting(group, f.name, f.default, *(("--temperature",) if f.name == "temp" else ()))


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The values of `add_sampling_settings`."""
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling) if f.name != "logit_bias"})


def add_setting(group: Any, name: str, default: Any, *flags: str, about: str = "") -> None:
    """A flag with the help and values of one of RANGES."""
    group.add_argument(
        f"--{name.replace('_', '-')}", *flags, type=RANGES[name].read, default=default, help=about or RANGES[name].about
    )


def check_template_flags(args: argparse.Namespace) -> None:
    """Refuse flags for the chat template together with --ignore-chat-template; raises OptionError."""
    for flag in ("--system-prompt", "--prefill-response", "--chat-template-config"):
        if args.ignore_chat_template and getattr(args, flag[2:].replace("-", "_"), None) is not None:
            raise OptionError(f"{flag} needs the chat template; leave out {flag} or --ignore-chat-template.")


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_model_options` and `add_expert_options` as arguments of `ring_mlx.load_model`."""
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


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Options for snapshots on disk."""
    g = group_of(parser, "snapshots")
    folder = "folder for snapshots (the system's for caches, or RING_MLX_CACHE)"
    g.add_argument("--cache-dir", type=Path, help=folder)
    g.add_argument("--no-store", action="store_true", help="keep snapshots in memory only")
    g.add_argument("--store-size", type=byte_count, default=8 << 30, metavar="SIZE", help="most room on disk (8 GiB)")


def store_of(args: argparse.Namespace) -> Path | bool:
    """The folder that `add_store_options` found, as `ring_mlx.Session` takes it."""
    return False if args.no_store else args.cache_dir or True


def positive_int(text: str) -> int:
    """An argparse type: an integer from 1."""
    return _int_from(text, 1)


def natural_int(text: str) -> int:
    """An argparse type: an integer from 0."""
    return _int_from(text, 0)


def counts(text: str) -> tuple[int, ...]:
    """An argparse type: positive integers with commas between them."""
    try:
        return tuple(positive_int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 512,2048") from None


def byte_count(text: str) -> int:
    """An argparse type: bytes, with a suffix KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB if wanted."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 8GB or 512MiB")
    power = 1 + "KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def seconds(text: str) -> float:
    """An argparse type: seconds, or a number with s, m or h; -1 is for ever."""
    found = re.fullmatch(r"(-1|\d+(?:\.\d+)?)\s*([smh]?)", text.strip(), re.IGNORECASE)
    if found is None or (found[1] == "-1" and found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 5m, 1h, 0 or -1")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2].lower()]


def decay_offset(text: str) -> int | str:
    """An argparse type: a key of DECAY_OFFSETS."""
    for value in DECAY_OFFSETS:
        if text == str(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(map(str, DECAY_OFFSETS))}")


def speculation(text: str) -> int | str:
    """An argparse type: off, auto or a number of drafted tokens."""
    value = int(text[:9]) if text.isdecimal() else text
    try:
        check_speculation(value)
    except OptionError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {SPECULATIONS}") from None
    return value


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


def _int_from(text: str, low: int) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is not {low} or more")
    return value
