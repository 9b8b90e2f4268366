"""The chat's configuration: a commented TOML file, and the check of its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from ring_mlx import RingError, text_of, value_range, write_text
from tui.commands import NAMED, SETTINGS
from tui.messages import Sampling, sampling_as_dict
from tui.paths import in_words

MOST_BYTES = 1_000_000
UNREADABLE = (OSError, ValueError, TOMLKitError, RecursionError)
START = """\
# Configuration of `ring-mlx chat`. Leave a line out, or delete the file, to have the default.

# textual-dark, textual-light, high-contrast, or any theme of the palette (Ctrl+P, "Theme").
# theme = "textual-dark"

# true shows nothing that moves by itself.
# reduced_motion = false

# false calls chats by their first words; else the model makes titles while nothing else is wanted.
# titles = true

# What tells you that an answer has ended while you look at another window: "bell", "osc9" (a notification of the
# desktop, in terminals that know it) or "off"; only after so many seconds.
# notify = "bell"
# notify_after_s = 10

# Folder of a checkpoint or owner/name on the hub; without it the packaged toy.
# model = "inclusionAI/Ring-mini-linear-2.0"

# Folders with checkpoints, or with folders of owners that have them; the list of models (Ctrl+L) looks into these too.
# model_folders = ["/Volumes/models"]

# Said to the model before every chat.
# system_prompt = ""

# [sampling]
# temp = 0.6               0 is greedy; without a line, this and the next three are what the model says
# top_p = 1.0
# top_k = 0                0 is all
# min_p = 0.0
# max_tokens = -1          of an answer, thought included; -1 is what the context holds
# thinking_budget = 1024   close the thought after so many tokens
# seed = 7
# xtc_probability = 0.5    how often the likeliest tokens are left out; xtc_threshold = 0.1 from which probability

# [presets.exact]          /preset exact
# temp = 0.0
# system_prompt = "Answer in one sentence."

# [keys]                   names of commands as /help lists them; turn_edit and so on while a turn has the focus;
#                          send and new_line in the prompt
# new = "ctrl+n"
# send = "enter"
"""
NOTIFY = ("bell", "osc9", "off")
KINDS = {bool: "true or false", int: "a whole number", str: "a text"}
PROMPT_KEYS = {"send": "enter", "new_line": "ctrl+j,shift+enter,alt+enter"}


@dataclass(frozen=True)
class Preset:
    """Named settings."""

    sampling: Sampling = field(default_factory=Sampling)
    system_prompt: str = ""


@dataclass(frozen=True)
class Config:
    """The configuration; ``keys`` are by command, with turn_ before those on a turn, and "send" and "new_line"."""

    theme: str = "textual-dark"
    reduced_motion: bool = False
    titles: bool = True
    notify: str = "bell"
    notify_after_s: int = 10
    model: str = ""
    model_folders: tuple[str, ...] = ()
    system_prompt: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    presets: dict[str, Preset] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def without(self, preset: str) -> Config:
        """The configuration without a preset."""
        return replace(self, presets={n: p for n, p in self.presets.items() if n != preset})


def checked(name: str, value: object) -> int | float | None:
    """A value of the sampling, as a number in its range; raises ValueError in words for the user."""
    if name not in SETTINGS:
        raise ValueError(f"{name} is not a setting; there are {', '.join(SETTINGS)}")
    if name != "max_tokens" and value in (None, "", "none"):
        return None
    return value_range(name).read(value) if isinstance(value, str) else value_range(name).check(value)


def with_prompt_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """The keys, with those of "send" and "new_line"."""
    return {**PROMPT_KEYS, **keys}


def with_setting(sampling: Sampling, name: str, value: object) -> Sampling:
    """The sampling with one value changed; raises ValueError in words for the user."""
    return replace(sampling, **{name: checked(name, value)})  # type: ignore[arg-type]


def parse(raw: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """A configuration from TOML's values, and what was wrong; a wrong value is replaced by the default."""
    found: list[str] = []
    values: dict[str, Any] = {}
    plain = Config()
    readers = {"sampling": _sampling, "presets": _presets, "keys": _keys, "model_folders": _folders, "notify": _notify}
    for name, value in raw.items():
        if name in readers:
            values[name] = readers[name](value, name, found)
        elif name not in {f.name for f in fields(Config)}:
            found.append(f"{name} is not known")
        elif type(value) is not type(getattr(plain, name)):
            found.append(f"{name} is not {KINDS[type(getattr(plain, name))]}")
        else:
            values[name] = value
    return Config(**values), found


def _notify(raw: object, where: str, found: list[str]) -> str:
    if raw in NOTIFY:
        return str(raw)
    found.append(f"{where} is none of {', '.join(NOTIFY)}")
    return Config().notify


def _table(raw: object, where: str, found: list[str]) -> Mapping[Any, Any]:
    if isinstance(raw, Mapping):
        return raw
    found.append(f"{where} is not a table")
    return {}


def _sampling(raw: object, where: str, found: list[str]) -> Sampling:
    sampling = Sampling()
    for name, value in _table(raw, where, found).items():
        try:
            sampling = with_setting(sampling, name, value)
        except ValueError as e:
            found.append(f"{where}: {e}")
    return sampling


def _presets(raw: object, where: str, found: list[str]) -> dict[str, Preset]:
    presets = {}
    for name, table in _table(raw, where, found).items():
        values = dict(table) if isinstance(table, Mapping) else {}
        prompt = values.pop("system_prompt", "")
        presets[str(name)] = Preset(_sampling(values, f"presets.{name}", found), str(prompt))
    return presets


def _folders(raw: object, where: str, found: list[str]) -> tuple[str, ...]:
    if isinstance(raw, list) and all(isinstance(folder, str) for folder in raw):
        return tuple(raw)
    found.append(f"{where} is not a list of texts")
    return ()


def _keys(raw: object, where: str, found: list[str]) -> dict[str, str]:
    keys = {}
    for name, value in _table(raw, where, found).items():
        if str(name).removeprefix("turn_") not in NAMED and name not in PROMPT_KEYS:
            found.append(f"keys.{name} names no command")
        elif not isinstance(value, str) or not value:
            found.append(f"keys.{name} is not a text")
        else:
            keys[str(name)] = value
    return keys


class ConfigError(RingError):
    """The configuration cannot be read or written."""

    origin = "config"


def load(path: Path) -> tuple[Config, str]:
    """The configuration, and a line about what is wrong with it, or nothing; without a file all defaults."""
    try:
        raw = tomlkit.parse(text_of(path, MOST_BYTES)).unwrap()
    except FileNotFoundError:
        return Config(), ""
    except UNREADABLE as e:
        return Config(), str(
            ConfigError(f"{path} cannot be read ({in_words(e)}); mend or delete it, the defaults hold.")
        )
    config, wrong = parse(raw)
    return config, str(ConfigError(f"{path}: {'; '.join(wrong)}; the defaults hold there.")) if wrong else ""


def save(path: Path, config: Config, before: Config | None = None) -> None:
    """Write what has changed; the file keeps its comments. All of it or nothing.

    Args:
        path: The file.
        config: What holds now.
        before: What held before, so that options of the command line, in both, are not written; by default the file.

    Raises:
        ConfigError: If the file is there but broken, or cannot be written.
    """
    try:
        is_new = not path.exists()
        text = START if is_new else text_of(path, MOST_BYTES)
        document = tomlkit.parse(text)
        kept = parse(document.unwrap())[0]
        _update(document, _changed(kept, before or kept, config), kept)
        write_text(path, tomlkit.dumps(document), private=is_new)
    except UNREADABLE as e:
        raise ConfigError(f"{path} cannot be written ({in_words(e)}); the settings are used until you quit.") from None


def _changed(kept: Config, before: Config, now: Config) -> Config:
    """The file's configuration with what differs between ``before`` and ``now``."""
    new = {f.name: getattr(now, f.name) for f in fields(Config) if getattr(now, f.name) != getattr(before, f.name)}
    if "sampling" in new:
        ours = {k: v for k, v in vars(now.sampling).items() if v != getattr(before.sampling, k)}
        new["sampling"] = replace(kept.sampling, **ours)
    return replace(kept, **new)


def _update(document: tomlkit.TOMLDocument, new: Config, old: Config) -> None:
    for name in ("theme", "reduced_motion", "titles", "model", "system_prompt"):
        if getattr(new, name) != getattr(old, name):
            document[name] = getattr(new, name)
    if new.sampling != old.sampling:
        document["sampling"] = _sampling_table(new.sampling)
    if new.presets != old.presets:
        document["presets"] = {name: _preset_table(p) for name, p in new.presets.items()}


def _sampling_table(s: Sampling) -> dict[str, object]:
    plain = sampling_as_dict(Sampling())
    return {name: value for name, value in sampling_as_dict(s).items() if value != plain.get(name)}


def _preset_table(p: Preset) -> dict[str, object]:
    return {**_sampling_table(p.sampling), **({"system_prompt": p.system_prompt} if p.system_prompt else {})}
