"""What follows from a check of the decay: a key of config.json, written on request; knows files and no statistics."""

from __future__ import annotations

import json
from pathlib import Path

from ring_mlx.checkpoint_files import read_json
from ring_mlx.config_values import shown
from ring_mlx.convert.writer import MANIFEST, amend
from ring_mlx.doctor.decay_check import KEY, SECTION, Offset, Verdict
from ring_mlx.doctor.finding import OK, PROBLEM, Finding
from ring_mlx.errors import ConfigError
from ring_mlx.files import write_atomically


def write_choice(folder: Path, verdict: Verdict) -> Finding:
    """Put the formula that was found into config.json, and say so; nothing is written where none was."""
    if verdict.decided is None:
        return Finding(SECTION, "config.json", PROBLEM, "not written: there is no verdict", "see its remedy")
    write_offset(folder, verdict.decided)
    return Finding(SECTION, "config.json", OK, f"{KEY} {shown(verdict.decided)} is written to {folder / 'config.json'}")


def write_offset(folder: Path, offset: Offset) -> None:
    """Set the key in a model's config.json, all of it or nothing; a link, as in the hub's cache, becomes a file.

    Raises:
        ConfigError: If the file cannot be read or written.
    """
    file = folder / "config.json"
    text = json.dumps(read_json(file) | {KEY: offset}, indent=4, ensure_ascii=False) + "\n"
    try:
        write_atomically(file, lambda name: Path(name).write_text(text, encoding="utf-8"), private=False)
        if (folder / MANIFEST).is_file():
            amend(folder, ("config.json",))
    except OSError as e:
        raise ConfigError(f"{file} cannot be written ({e}); copy the model to a folder of yours.") from None
