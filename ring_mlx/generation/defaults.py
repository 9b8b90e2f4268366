"""Defaults of sampling and answer length, the same in every command.

A setting is the first of these that is given: that of the request or the option, that of the checkpoint's
generation_config.json, that which the cards of the model family recommend. An answer goes on until the model ends it or the
context is full.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.errors import ConfigError
from ring_mlx.generation.sampling_ranges import RANGES, REST, OutOfRangeError
from ring_mlx.model.config_values import shown
from ring_mlx.system.regular_files import read_json

FILE = "generation_config.json"
MAX_TOKENS = REST
FAMILY = Sampling(temp=0.6, top_p=1.0, min_p=0.0, top_k=0)
# What generation_config.json calls the settings that are taken from it.
SENT_AS = {
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
}


def filled(asked: Sampling, defaults: Sampling = FAMILY) -> Sampling:
    """The requested settings, with a checkpoint's where there is none."""
    open_ones = (name for name in SENT_AS.values() if getattr(asked, name) is None)
    return replace(asked, **{name: getattr(defaults, name) for name in open_ones})


def read_defaults(folder: Path, vocabulary: int) -> Sampling:
    """The settings of a checkpoint, which need not have the file; a ``top_k`` of the whole vocabulary is 0.

    Raises ConfigError if the file is not JSON, or holds a value that a setting cannot have.
    """
    raw = read_json(folder / FILE) if (folder / FILE).exists() else {}
    values: dict[str, Any] = {}
    for key, name in SENT_AS.items():
        value = raw.get(key)
        if value is None:
            continue
        if key == "top_k" and (value == -1 or (type(value) is int and value >= vocabulary)):
            value = 0
        try:
            values[name] = RANGES[name].check(value, key)
        except OutOfRangeError as e:
            raise ConfigError(f"{e} ({folder / FILE}); correct it.") from None
    samples = raw.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise ConfigError(f"do_sample {shown(samples)} is neither true nor false ({folder / FILE}); correct it.")
    if samples is False:
        values["temp"] = 0.0
    return replace(FAMILY, **values)
