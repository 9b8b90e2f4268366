"""Checks single values of a config.json, and shortens them for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from ring_mlx.errors import ConfigError, OptionError

# No model of the family comes near. Without a limit, a size would be believed before the weights are looked at.
MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 20,
    "moe_shared_expert_intermediate_size": 1 << 24,
    "num_experts": 1 << 17,
    "num_shared_experts": 1 << 10,
    "vocab_size": 1 << 24,
}
# How layers are numbered in the decay's formula. Public sources disagree, and nobody here has read real weights: see
# docs/doctor.md.
DECAY_KEY = "decay_layer_offset"
CLAMPED = "clamped"
DECAY_OFFSETS: dict[int | str, str] = {
    0: "layers counted from 0, as in the authors' engines",
    -1: "one less, in layer 0 too, as in the released Hugging Face file",
    CLAMPED: "one less, but not in layer 0, as in mlx-lm",
}
MOST_INTEGER = (1 << 31) - 1
MOST_FLOAT = 1e30


def check_integers(raw: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse sizes that no model has, before anything is calculated from them.

    Raises ConfigError if one of ``keys`` is an integer beyond the most that is read.
    """
    for key in keys:
        value, most = raw.get(key), MOST.get(key, MOST_INTEGER)
        if isinstance(value, int) and not -MOST_INTEGER <= value <= most:
            raise ConfigError(f"{key} {shown(value)} is beyond {most:,}, the most that is read; correct config.json.")


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_decay_offset(value: object) -> TypeGuard[int | str]:
    """Whether a value is a key of DECAY_OFFSETS, and of its type."""
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value in DECAY_OFFSETS


def no_decay_offset(value: object) -> str:
    """The message about a value that `is_decay_offset` refuses."""
    return f"{DECAY_KEY} {shown(value)} is not {' or '.join(map(shown, DECAY_OFFSETS))}"


def check_decay_offset(value: object) -> None:
    """Refuse a value that is neither a key of DECAY_OFFSETS nor None.

    Raises:
        OptionError: Naming the value.
    """
    if value is not None and not is_decay_offset(value):
        raise OptionError(f"{no_decay_offset(value)}; choose one.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MOST_FLOAT <= value <= MOST_FLOAT


def shown(value: object, most: int = 200) -> str:
    """A value as JSON writes it, cut to ``most`` characters."""
    if isinstance(value, int) and abs(value) > 1 << 200:
        return f"of {value.bit_length()} bits"
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= most else f"{text[:most]}..."


def some(names: Sequence[str], limit: int = 6) -> str:
    """The first names, none of them too long for a line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(n if len(n) <= 200 else f"{n[:200]}..." for n in names[:limit]) + more
