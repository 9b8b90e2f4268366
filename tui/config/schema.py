"""What can be configured, and which values make sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ring_mlx import value_range
from tui.commands import NAMED, SETTINGS
from tui.messages import Sampling

PROMPT_KEYS = {"send": "enter", "new_line": "ctrl+j,shift+enter,alt+enter"}


@dataclass(frozen=True)
class Preset:
    """Named settings."""

    sampling: Sampling = field(default_factory=Sampling)
    system_prompt: str = ""


@dataclass(frozen=True)
class Config:
    """All that is configured; ``keys`` are commands, turn_ before those on a turn, and "send" and "new_line"."""

    theme: str = "textual-dark"
    reduced_motion: bool = False
    model: str = ""
    system_prompt: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    presets: dict[str, Preset] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def checked(name: str, value: object) -> int | float | None:
    """A value of the sampling, as a number in its range.

    Raises:
        ValueError: In words for the user.
    """
    if name not in SETTINGS:
        raise ValueError(f"{name} is not a setting; there are {', '.join(SETTINGS)}")
    if name != "max_tokens" and value in (None, "", "none"):
        return None
    return value_range(name).read(value) if isinstance(value, str) else value_range(name).check(value)


def without_preset(config: Config, name: str) -> Config:
    """The configuration in which a preset is gone."""
    return replace(config, presets={n: p for n, p in config.presets.items() if n != name})


def prompt_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """The keys of "send" and "new_line"."""
    return {name: keys.get(name, plain) for name, plain in PROMPT_KEYS.items()}


def with_setting(sampling: Sampling, name: str, value: object) -> Sampling:
    """The sampling with one value changed.

    Raises:
        ValueError: In words for the user.
    """
    return replace(sampling, **{name: checked(name, value)})  # type: ignore[arg-type]


def parse(raw: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """A configuration from TOML's values, and what was wrong; a wrong value gives way to the default."""
    found: list[str] = []
    values: dict[str, Any] = {}
    plain = Config()
    for name, value in raw.items():
        if name == "sampling":
            values[name] = _sampling(value, "sampling", found)
        elif name == "presets":
            values[name] = _presets(value, found)
        elif name == "keys":
            values[name] = _keys(value, found)
        elif name not in {f.name for f in fields(Config)}:
            found.append(f"{name} is not known")
        elif type(value) is not type(getattr(plain, name)):
            found.append(f"{name} is not {'true or false' if name == 'reduced_motion' else 'a text'}")
        else:
            values[name] = value
    return Config(**values), found


def _sampling(raw: object, where: str, found: list[str]) -> Sampling:
    sampling = Sampling()
    if not isinstance(raw, Mapping):
        found.append(f"{where} is not a table")
        return sampling
    for name, value in raw.items():
        try:
            sampling = with_setting(sampling, name, value)
        except ValueError as e:
            found.append(f"{where}: {e}")
    return sampling


def _presets(raw: object, found: list[str]) -> dict[str, Preset]:
    presets = {}
    if not isinstance(raw, Mapping):
        found.append("presets is not a table")
        return {}
    for name, table in raw.items():
        values = dict(table) if isinstance(table, Mapping) else {}
        prompt = values.pop("system_prompt", "")
        presets[str(name)] = Preset(_sampling(values, f"presets.{name}", found), str(prompt))
    return presets


def _keys(raw: object, found: list[str]) -> dict[str, str]:
    keys = {}
    if not isinstance(raw, Mapping):
        found.append("keys is not a table")
        return {}
    for name, value in raw.items():
        if str(name).removeprefix("turn_") not in NAMED and name not in PROMPT_KEYS:
            found.append(f"keys.{name} names no command")
        elif not isinstance(value, str) or not value:
            found.append(f"keys.{name} is not a text")
        else:
            keys[str(name)] = value
    return keys
