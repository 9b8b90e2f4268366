"""Which models ``ring-mlx serve`` serves, and by which names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.errors import OptionError, RingError
from ring_mlx.model.config import read_config
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.models import Served
from ring_mlx.system.terminal_text import note

KEEP_S, DEEPEST = 300.0, 2
OF_ONE_MODEL = ("revision", "adapter_path", "draft_model")
CONFIG = "config.json"


def served_models(args: argparse.Namespace, settings: Settings) -> list[Served]:
    """The models of the options, each with a name of its own. Raises OptionError if two share one, or there is none."""
    given = args.models or [str(demo_model_path())]
    names = args.model_name or [_name(model) for model in given]
    if len(names) != len(given):
        raise OptionError(
            f"--model-name is given {len(names)} times for {len(given)} models; give it for each or none."
        )
    found = [one for model, name in zip(given, names, strict=True) for one in _found(model, name)]
    if len(found) > 1:
        for option in OF_ONE_MODEL:
            if getattr(args, option, None) is not None:
                raise OptionError(f"--{option.replace('_', '-')} belongs to one model; serve that one alone.")
    if not args.models and not args.model_name:
        found = [(given[0], "ring-nano")]
    paths: dict[str, str] = {}
    for path, name in found:
        if name in paths:
            raise OptionError(
                f"{paths[name]} and {path} are both called {name!r}; give --model-name once for each --model."
            )
        paths[name] = path
    contexts = {name: _context(path) for name, path in paths.items()} if len(paths) > 1 else {}
    return [Served(replace(settings, model=path, name=name), contexts.get(name)) for name, path in paths.items()]


def aliases_of(args: argparse.Namespace, served: list[Served]) -> dict[str, str]:
    """The further names of models. Raises OptionError if one is a model's own, stands for two, or for none."""
    names, found = [one.name for one in served], dict[str, str]()
    for text in args.alias:
        alias, _, name = text.partition("=")
        if not alias or not name:
            raise OptionError(f"--alias {text!r} is not ALIAS=MODEL, such as gpt-5={names[0]}; give it so.")
        if name not in names:
            raise OptionError(f"--alias {text!r}: no model is called {name!r}; give one of {', '.join(names[:20])}.")
        if alias in names or found.setdefault(alias, name) != name:
            raise OptionError(f"--alias {text!r}: {alias!r} stands for another model already; choose another name.")
    return found


def keep_s_of(args: argparse.Namespace, served: list[Served]) -> float | None:
    """How long a model stays that nobody uses; None is for ever, what a single model has if nothing is said."""
    return (KEEP_S if len(served) > 1 else None) if args.keep is None else None if args.keep < 0 else args.keep


def _found(model: str, name: str) -> Iterator[tuple[str, str]]:
    """A checkpoint, or those of a folder without config.json; what cannot be one is told and left out."""
    folder = Path(os.path.expanduser(model))
    inside = sorted(_checkpoints(folder)) if folder.is_dir() and not (folder / CONFIG).exists() else []
    if not inside:
        yield model, name
        return
    count = 0
    for path in inside:
        try:
            read_config(path)
        except RingError as e:
            note(f"[serve] {path} is left out: {e}")
            continue
        count += 1
        yield str(path), path.relative_to(folder).as_posix()
    if not count:
        raise OptionError(f"no folder in {model} has a checkpoint that can be served; see the lines above.")


def _checkpoints(folder: Path, depth: int = 1) -> Iterator[Path]:
    try:
        below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return
    for path in below:
        if (path / CONFIG).is_file():
            yield path
        elif depth < DEEPEST:
            yield from _checkpoints(path, depth + 1)


def _context(path: str) -> int | None:
    """The context of a checkpoint that is here."""
    try:
        return read_config(Path(os.path.expanduser(path)))[0].context_tokens
    except RingError:
        return None


def _name(model: str) -> str:
    folder = Path(os.path.expanduser(model))
    return Path(os.path.abspath(folder)).name if folder.is_dir() else model
