"""Texts attached to a question: reading them, finding them in pasted text, completing names."""

from __future__ import annotations

import os
import re
import shlex
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from textual.content import Content

from ring_mlx import RingError, harmless, text_of
from tui.fuzzy import best
from tui.parts import STOPS, can_attach, folder_name, is_file, is_folder, lines_of, listing, part_of
from tui.store import Attachment

MOST_BYTES, MOST_BYTES_OF_PARTS, MOST_COMPLETIONS, MOST_ENTRIES = 4_000_000, 32_000_000, 50, 20_000
MOST_DEEPER = 1500  # paths below a folder that are looked at
SKIPPED = ("node_modules", "__pycache__")
MOST_WORDS, MOST_STOPS = 32, 4  # of a path with spaces in it, after it
MOST_MENTIONS, MOST_BEGUN = 200, 4  # looked at in a text, in a line
_MENTION = re.compile(r"(?<!\S)@(?=\S)([^\n]{1,4096})")
_QUOTED = re.compile(r"""(["'])(.+?)\1""")


class AttachError(RingError):
    """A file cannot be attached."""

    origin = "attach"


def read_attachment(path: str) -> Attachment:
    """The text of a file, of lines of one such as ``notes.txt#20-45``, or the names in a folder.

    Raises:
        AttachError: If it is missing, too large or no text.
    """
    part = None if is_file(path) else part_of(path)
    try:
        if is_folder(path):
            return Attachment(folder_name(path), listing(path))
        text = text_of(Path(part[0]), MOST_BYTES_OF_PARTS) if part else text_of(Path(path), MOST_BYTES)
        if "\0" in text:
            raise AttachError(f"{path} is not text; attach a text file.")
        if part is None:
            return Attachment(Path(path).name, text)
        text = lines_of(text, part[1])
    except UnicodeDecodeError:
        raise AttachError(f"{path} is not UTF-8 text; attach a text file.") from None
    except OSError as e:
        raise AttachError(f"{path} cannot be read ({e.strerror}); attach a text file or a part of one.") from None
    except ValueError as e:
        raise AttachError(f"{path} {e}." if part else f"{path} cannot be read ({e}); attach a text file.") from None
    if len(text) > MOST_BYTES:
        raise AttachError(f"{path} has more than {MOST_BYTES // 1_000_000} MB; attach fewer lines.")
    return Attachment(Path(path).name, text)


def mentioned(text: str) -> list[str]:
    """What exists of what a text mentions as ``@path``, each once."""
    found, at = [], 0
    for _ in range(MOST_MENTIONS):
        if (mention := _MENTION.search(text, at)) is None:
            break
        path, length = _at_start(mention[1])
        found += [path] if path else []
        at = mention.start(1) + length
    return list(dict.fromkeys(found))


def _at_start(text: str) -> tuple[str, int]:
    """The longest existing file, part of one or folder that a text begins with, perhaps in quotes, and its length there."""
    if (quoted := _QUOTED.match(text)) is not None and can_attach(quoted[2]):
        return quoted[2], quoted.end()
    ends = [m.end() for m in islice(re.finditer(r"\S+", text), MOST_WORDS)]
    for end in reversed(ends):
        least = len(text[:end].rstrip(STOPS))
        for written in (text[:n] for n in range(end, max(least, end - MOST_STOPS) - 1, -1)):
            path = written.replace("\\ ", " ")
            if name := next((p for p in (written, path) if p and can_attach(p)), ""):
                return name, len(written)
    return "", ends[0]


def begun(line: str) -> str | None:
    """The path that a line ends in after an @, perhaps with spaces in it, or None."""
    for at in [m.end() for m in re.finditer(r"(?<!\S)@", line)][: -MOST_BEGUN - 1 : -1]:
        start = line[at:]
        if " " not in start or (len(start) < 4096 and not _at_start(start)[0] and _begins(start)):
            return start
    return None


def _begins(start: str) -> bool:
    """Whether a path begins so, or could but for upper and lower case."""
    return any(path.lower().startswith(start.lower()) for path, _ in completions(start))


def dropped(pasted: str) -> list[str]:
    """The files that were dropped on the terminal, from the pasted text; nothing if it is other text."""
    text = pasted.strip()
    if not text or "\n" in text or len(text) > 4096:
        return []
    try:
        words = [text] if is_file(text) else shlex.split(text)
    except ValueError:
        return []
    paths = [unquote(urlsplit(w).path) if w.startswith("file://") else w for w in words]
    is_path = all(("/" in p or p.startswith("~")) and is_file(p) for p in paths)
    return paths if paths and is_path else []


def completions(start: str) -> list[tuple[str, Content]]:
    """Paths that match what follows the folder that a text begins with, the best first, with the letters of the text marked.

    Folders end in a slash. What is deeper comes after what is in the folder itself, and has letters together that have no
    slash between them. Hidden names come only after a dot,
    those with control characters never.
    """
    folder, slash, name = start.rpartition("/")
    folder += slash
    while folder and not is_folder(folder):
        folder = folder[: folder.rstrip("/").rfind("/") + 1]
    wanted = start[len(folder) :]
    found = [] if "/" in wanted else best(wanted, _names(folder, name.startswith(".")), str, MOST_COMPLETIONS)
    if "/" in wanted or (len(wanted) > 1 and not start.startswith(("/", "~", "."))):
        below = _deeper(folder)
        together = below if "/" in wanted else [path for path in below if wanted.lower() in path.lower()]
        found += best(wanted, together, str, MOST_COMPLETIONS)
    return [(folder + path, Content(folder).append(shown)) for path, shown in found[:MOST_COMPLETIONS]]


def _names(folder: str, with_hidden: bool = False, most: int = MOST_ENTRIES) -> list[str]:
    """The names in a folder, folders first and with a slash."""
    try:
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            found = sorted((not e.is_dir(), e.name.lower(), e.name) for e in islice(entries, most))
    except (OSError, ValueError, RuntimeError):
        return []
    return [
        entry if is_file else f"{entry}/"
        for is_file, _, entry in found
        if entry == harmless(entry, is_name=True) and (with_hidden or not entry.startswith("."))
    ]


def _deeper(folder: str) -> list[str]:
    """Paths below the folders in a folder, level by level, at most so many."""
    found: list[str] = []
    folders = [n for n in _names(folder) if n.endswith("/")]
    while folders and len(found) < MOST_DEEPER:
        at = folders.pop(0)
        if at.split("/")[-2] in SKIPPED or os.path.islink(folder + at[:-1]):
            continue
        names = [at + n for n in _names(folder + at, most=MOST_DEEPER)]
        found += names
        folders += [n for n in names if n.endswith("/")]
    return found[:MOST_DEEPER]
