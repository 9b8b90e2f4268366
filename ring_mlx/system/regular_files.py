"""Files of a checkpoint, which may be hostile: only regular files are opened, and how much is read is bounded."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from ring_mlx.errors import ConfigError, RingError

MIB = 1 << 20
# Of a file of settings; an index of 100,000 tensors takes 10 MiB.
MAX_JSON_BYTES = 32 * MIB
# A tokenizer of 262,144 tokens takes 32 MiB and has 1.5 million commas. Each may become an object of 64 bytes.
MAX_TOKENIZER_BYTES = 96 * MIB
MAX_VALUES = 6_000_000
# The longest number that is read. More digits are no size, id or setting, and Python refuses thousands of them.
MAX_DIGITS = 100
# What commands and libraries look for in a checkpoint's folder besides its safetensors.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")

_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Error = Callable[[str], RingError]


def open_regular(path: Path, error: Error = ConfigError) -> BinaryIO:
    """Open a file for reading; a FIFO, socket, device or file of /proc is refused before anything waits for it.

    Raises a FileNotFoundError if there is none, else ``error``. ``path`` may be a link, as in huggingface_hub's cache.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            raise error(f"{path} is {_kind(kind)}, not a file; download it again.")
        # Something else may take its place meanwhile, which then does not block.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as e:
        raise error(f"{_short(path)} cannot be read ({e.strerror}); check it and its permissions.") from None
    except ValueError as e:
        raise error(f"{_short(path)} is not a file's name ({e}); correct it.") from None
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or (not found.st_size and _has_content(file.fileno())):
        file.close()
        raise error(f"{path} is not a file; download it again.")
    return file


def read_bounded(path: Path, most_bytes: int, error: Error = ConfigError) -> bytes:
    """The content of a file; errors as `open_regular`, and if it is longer than ``most_bytes``."""
    with open_regular(path, error) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as e:
            raise error(f"{path} cannot be read ({e.strerror}); check the disk.") from None
    if len(data) > most_bytes:
        raise error(f"{path} is longer than {most_bytes // MIB} MiB, too long for such a file; download it again.")
    return data


def read_json(path: Path, error: Error = ConfigError, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object from a file; raises ``error`` if it is missing, too long or no such object."""
    try:
        data = read_bounded(path, most_bytes, error)
    except FileNotFoundError:
        raise error(f"no {path.name} in {path.parent}; give the folder of a downloaded checkpoint.") from None
    return parse_object(data, str(path), error)


def parse_object(data: bytes, name: str, error: Error = ConfigError) -> dict[str, Any]:
    """Parse a JSON object; raises ``error`` naming it if it is none.

    It is in UTF-8, its keys differ, and its numbers and depth are such that Python can hold them.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise error(f"{name} holds more than {MAX_VALUES:,} values, too many for such a file; download it again.")
    try:
        # A function for each number takes longer than all the rest, so only a long row of digits brings it in.
        parse_int = _integer if _LONG_NUMBER.search(data) else None
        raw = json.loads(data.decode(), object_pairs_hook=_object, parse_int=parse_int)
        if b"\\u" in data and _SURROGATE.search(data):
            # Half of a pair is no text: it could not be printed or written.
            json.dumps(raw, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{name} is nested too deeply; download the file again.") from None
    except ValueError as e:
        raise error(f"{name} is not valid JSON ({e}); download the file again.") from None
    if not isinstance(raw, dict):
        raise error(f"{name} holds a {type(raw).__name__}, not an object; download the file again.")
    return raw


def check_small_files(folder: Path, error: Error = ConfigError, patterns: Iterable[str] = SMALL_FILES) -> None:
    """Raise ``error`` for a file that a library would read of a folder if it is irregular or too long."""
    for pattern in patterns:
        for path in sorted(f for f in folder.glob(pattern) if not is_litter(f)):
            try:
                open_regular(path, error).close()
            except FileNotFoundError:
                raise error(f"{path} is a link to a file that is missing; download it again.") from None
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise error(f"{path} is longer than {MAX_TOKENIZER_BYTES // MIB} MiB; download it again.")


def is_litter(path: Path) -> bool:
    """Whether a file is one that macOS writes beside each file on a foreign disk."""
    return path.name.startswith("._")


@contextmanager
def without_litter(folder: Path) -> Iterator[Path]:
    """The folder, or if it has litter one of links to its small files, for libraries that would read that."""
    files = [f for pattern in SMALL_FILES for f in folder.glob(pattern)]
    if not any(is_litter(f) for f in files):
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in files:
            if not is_litter(file):
                link = Path(made) / file.relative_to(folder)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(file.resolve())
        yield Path(made)


def is_inside(name: object) -> bool:
    """Whether a name in a checkpoint is that of a file in its own folder, and can be opened."""
    if not isinstance(name, str) or "\0" in name or name == "..":
        return False
    return name == Path(name).name and 0 < len(name.encode("utf-8", "replace")) <= 255


def _has_content(handle: int) -> bool:
    """Whether a file of size 0 has content: files of /proc and the like, some of which wait or have no end."""
    try:
        return bool(os.read(handle, 1))
    except OSError:
        return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(twice)!r} stands twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _short(text: object, most: int = 100) -> str:
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _kind(mode: int) -> str:
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return "a device"
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "something else")
