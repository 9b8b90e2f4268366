"""What may be attached beside a whole file: some of its lines, and the names in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ring_mlx import harmless, whole_text

STOPS = ".,;:!?)"  # that may follow a path in a sentence
LISTED, MOST_ENTRIES = 1000, 20_000  # names shown, and looked at
_LINES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def part_of(path: str) -> tuple[str, str] | None:
    """The file and what stands after the last ``#`` of a path such as ``notes.txt#20-45``, if there is such a file."""
    file, sign, lines = path.rpartition("#")
    return (file, lines) if sign and not re.search(r"\s", lines) and is_file(file) else None


def is_file(path: str) -> bool:
    """Whether there is such a file; also False for impossible names."""
    return not path.endswith("/") and _is(path, Path.is_file)


def is_folder(path: str) -> bool:
    """Whether a path ends with a slash, and there is such a folder."""
    return path.endswith("/") and _is(path, Path.is_dir)


def can_attach(path: str) -> bool:
    """Whether a path names a file, lines of one or, with a slash at its end, a folder."""
    return is_file(path) or is_folder(path) or (path[-1:] not in STOPS and part_of(path) is not None)


def lines_of(text: str, wanted: str) -> str:
    """Lines of a text, counted from 1, such as ``20-45`` or ``20``.

    Raises:
        ValueError: If it has no such lines.
    """
    found = _LINES.fullmatch(wanted)
    if found is None:
        raise ValueError("names no lines; give #20 or #20-45")
    first, last = int(found[1]), int(found[2] or found[1])
    lines = text.removesuffix("\n").split("\n") if text else []
    if not 1 <= first <= last <= len(lines):
        raise ValueError(
            f"names lines that are not there; give #{'1' if len(lines) < 2 else f'1-{len(lines)}'} or fewer"
        )
    return "\n".join(lines[first - 1 : last]) + "\n"


def listing(folder: str) -> str:
    """The names in a folder, folders first and with a slash, files with their size, links with what they say.

    Raises:
        OSError: If it cannot be read.
    """
    with os.scandir(os.path.expanduser(folder)) as entries:
        found = list(islice(entries, MOST_ENTRIES))
    found.sort(key=lambda e: (not e.is_dir(follow_symlinks=False), e.name.lower(), e.name))
    more = len(found) - LISTED
    rest = [f"… and {'more than ' if len(found) == MOST_ENTRIES else ''}{more:,} more"] if more > 0 else []
    return "\n".join([*map(_entry, found[:LISTED]), *rest]) + "\n" if found else "(empty)\n"


def file_size_text(size: int) -> str:
    """A number of bytes in few characters."""
    return f"{size} B" if size < 1000 else f"{size / 1000:.1f} KB" if size < 1_000_000 else f"{size / 1e6:.1f} MB"


def folder_name(folder: str) -> str:
    """What to call a folder."""
    return f"{Path(os.path.abspath(os.path.expanduser(folder))).name}/"


def _entry(entry: os.DirEntry[str]) -> str:
    name = entry.name
    try:
        if entry.is_symlink():
            name = f"{name} -> {os.readlink(entry.path)}"
        elif entry.is_dir(follow_symlinks=False):
            name = f"{name}/"
        elif entry.is_file(follow_symlinks=False):
            name = f"{name}  {file_size_text(entry.stat(follow_symlinks=False).st_size)}"
    except OSError:  # it is gone
        pass
    return harmless(whole_text(name), is_name=True)


def _is(path: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(os.path.expanduser(path)))
    except (OSError, ValueError, RuntimeError):
        return False
