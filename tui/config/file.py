"""The configuration's file: read, and written without losing comments or half of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from ring_mlx import RingError, text_of, write_text
from tui.config.schema import Config, Preset, parse
from tui.messages import Sampling, sampling_as_dict

MOST_BYTES = 1_000_000
UNREADABLE = (OSError, ValueError, TOMLKitError, RecursionError)
START = """\
# Configuration of `ring-mlx chat`. Leave a line out, or delete the file, to have the default.

# textual-dark, textual-light, high-contrast, or any theme of the palette (Ctrl+P, "Theme").
# theme = "textual-dark"

# true shows nothing that moves by itself.
# reduced_motion = false

# Folder of a checkpoint or owner/name on the hub; without it the packaged toy.
# model = "inclusionAI/Ring-mini-linear-2.0"

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


class ConfigError(RingError):
    """The configuration cannot be read or written."""

    origin = "config"


def load(path: Path) -> tuple[Config, str]:
    """The configuration, and in one line what is wrong with it, or nothing; a missing file is all defaults."""
    try:
        raw = tomlkit.parse(text_of(path, MOST_BYTES)).unwrap()
    except FileNotFoundError:
        return Config(), ""
    except UNREADABLE as e:
        return Config(), str(ConfigError(f"{path} cannot be read ({e}); mend or delete it, the defaults hold."))
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
        raise ConfigError(f"{path} cannot be written ({e}); the settings hold until you quit.") from None


def _changed(kept: Config, before: Config, now: Config) -> Config:
    """The file's configuration with what differs between ``before`` and ``now``."""
    new = {f.name: getattr(now, f.name) for f in fields(Config) if getattr(now, f.name) != getattr(before, f.name)}
    if "sampling" in new:
        ours = {k: v for k, v in vars(now.sampling).items() if v != getattr(before.sampling, k)}
        new["sampling"] = replace(kept.sampling, **ours)
    return replace(kept, **new)


def _update(document: tomlkit.TOMLDocument, new: Config, old: Config) -> None:
    for name in ("theme", "reduced_motion", "model", "system_prompt"):
        if getattr(new, name) != getattr(old, name):
            document[name] = getattr(new, name)
    if new.sampling != old.sampling:
        document["sampling"] = _sampling(new.sampling)
    if new.presets != old.presets:
        document["presets"] = {name: _preset(p) for name, p in new.presets.items()}


def _sampling(s: Sampling) -> dict[str, object]:
    plain = sampling_as_dict(Sampling())
    return {name: value for name, value in sampling_as_dict(s).items() if value != plain.get(name)}


def _preset(p: Preset) -> dict[str, object]:
    return {**_sampling(p.sampling), **({"system_prompt": p.system_prompt} if p.system_prompt else {})}
