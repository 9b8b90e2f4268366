"""The models that are on this machine: folders, the hub's cache, the packaged toy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ring_mlx import Summary, each_cached_model, summary_of

TOY_NAME = "toy"
HERE = "."
PLACES = (HERE, "~/models", "~/.lmstudio/models", "~/.cache/lm-studio/models")
MOST_ENTRIES = 20_000  # of a folder


@dataclass(frozen=True)
class Found:
    """A model that can be chosen; ``path`` None is the packaged toy.

    ``fit`` says in a few words whether it fits this machine, ``detail`` in a sentence, where that is known.
    """

    name: str
    path: str | None
    remark: str
    fit: str = field(default="", compare=False)
    detail: str = field(default="", compare=False)


def found_models(places: Iterable[str] = PLACES) -> Iterator[Found]:
    """The toy, then Ring-linear checkpoints in the given places and in the hub's cache, each as soon as it is found.

    A place is a checkpoint, or has checkpoints, or like LM Studio's has folders of owners that have them; only in the
    working folder owners are not looked into.
    """
    yield Found(TOY_NAME, None, "packaged, for trying things out")
    seen: set[str] = set()
    for place in (p for p in places if "\0" not in p):
        for folder, owner in _folders(Path(os.path.expanduser(place)), depth=1 if place == HERE else 2):
            path = os.path.realpath(folder)
            if path not in seen and (summary := summary_of(folder)) is not None:
                yield _found(owner + (os.path.basename(path) or path), path, summary)
            seen.add(path)
    for name, folder in each_cached_model():
        if (summary := summary_of(folder)) is not None:
            yield _found(name, name, summary, "in the hub's cache, ")


def _folders(folder: Path, depth: int, owner: str = "", below: str = "") -> Iterator[tuple[Path, str]]:
    """A folder, and if it is no checkpoint those in it, which are ``below``; each with its owner and a slash if any."""
    yield folder, owner
    if not depth or os.path.exists(folder / "config.json"):
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in islice(entries, MOST_ENTRIES) if not e.name.startswith("."))
    except (OSError, ValueError):
        return
    for name in names:
        yield from _folders(folder / name, depth - 1, below, f"{name}/")


def _found(name: str, path: str, summary: Summary, where: str = "") -> Found:
    bits = f"{summary.bits}-bit, " if summary.bits else ""
    remark = f"{where}{bits}{size_text(summary.weight_bytes)}"
    return Found(name, path, remark, *_fit(summary))


def _fit(s: Summary) -> tuple[str, str]:
    if s.trouble:
        return s.trouble, f"It cannot be loaded: {s.trouble}."
    if s.tokens is None:
        return "", ""
    room = size_text(s.room_bytes)
    if not s.tokens:
        return fit_text(0), f"It needs {size_text(s.needed_bytes)}, this machine gives {room}."
    return fit_text(s.tokens), f"It fits into {room} with {s.tokens:,} tokens of context."


def fit_text(tokens: int) -> str:
    """Such as "fits, 131k tokens"."""
    return (
        f"fits, {tokens // 1000}k tokens" if tokens >= 1000 else f"fits, {tokens} tokens" if tokens else "does not fit"
    )


def size_text(n_bytes: int) -> str:
    """Such as "9.2 GB"."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.0f} MB"
