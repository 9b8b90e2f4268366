"""Text files attached to a question: reading them, finding them in pasted text, completing names."""

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
from tui.store import Attachment

MOST_BYTES, MOST_COMPLETIONS, MOST_ENTRIES = 4_000_000, 50, 20_000
_MENTION = re.compile(r"(?<!\S)@(\S+)")


class AttachError(RingError):
    """A file cannot be attached."""

    origin = "attach"


def read_attachment(path: str) -> Attachment:
    """The text of a file.

    Raises:
        AttachError: If it is missing, too large or no text.
    """
    try:
        text = text_of(Path(path), MOST_BYTES)
    except UnicodeDecodeError:
        raise AttachError(f"{path} is not UTF-8 text; attach a text file.") from None
    except (OSError, ValueError) as e:
        raise AttachError(
            f"{path} cannot be read ({e.strerror if isinstance(e, OSError) else e}); attach a text file or a part of one."
        ) from None
    if "\0" in text:
        raise AttachError(f"{path} is not text; attach a text file.")
    return Attachment(Path(path).name, text)


def mentioned(text: str) -> list[str]:
    """The existing files that a text mentions as ``@path``, each once."""
    found = (path.rstrip(".,;:!?)") if not is_file(path) else path for path in _MENTION.findall(text))
    return list(dict.fromkeys(path for path in found if is_file(path)))


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


def is_file(path: str) -> bool:
    """Whether there is such a file; also False for impossible names."""
    try:
        return Path(os.path.expanduser(path)).is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def completions(start: str) -> list[tuple[str, Content]]:
    """Paths whose last part matches that of the text, the best first, with the letters of the text marked.

    Folders end in a slash. Hidden ones come only after a dot, those with control characters never.
    """
    folder, slash, name = start.rpartition("/")
    folder += slash
    try:
        with os.scandir(Path(folder or ".").expanduser()) as entries:
            found = sorted((not e.is_dir(), e.name.lower(), e.name) for e in islice(entries, MOST_ENTRIES))
    except (OSError, ValueError, RuntimeError):
        return []
    names = [
        entry if is_file else f"{entry}/"
        for is_file, _, entry in found
        if entry == harmless(entry, is_name=True) and (name.startswith(".") or not entry.startswith("."))
    ]
    return [(folder + n, Content(folder).append(shown)) for n, shown in best(name, names, str, MOST_COMPLETIONS)]
