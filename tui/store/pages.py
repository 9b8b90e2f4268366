"""Reads rows from the pages of a damaged SQLite file.

Source: https://www.sqlite.org/fileformat2.html, sections 1.6 (pages), 2.1 (records) and 4 (the log).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE_LEAF, PAGE_BYTES = 0x0D, 4096
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEADER_BYTES, LOG_HEADER_BYTES, FRAME_HEADER_BYTES = 100, 32, 24
LOG_MAGIC_BIG = b"\x37\x7f\x06\x83"  # sums its words as big-endian ones
# A record's header: its length, no value for the row's number, then an id of 32 letters.
_RECORD = re.compile(rb"[\x08-\x1f]\x00\x4d", re.DOTALL)
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
Values = list[Any]


class Pages:
    """The pages of a database, with those of its log in place of older ones.

    Args:
        path: The database; its log lies beside it.
    """

    def __init__(self, path: Path) -> None:
        data, frames = path.read_bytes(), _log_of(path)
        said = {int.from_bytes(data[16:18], "big"), int.from_bytes(frames[8:12], "big")} & set(SIZES)
        self.size = PAGE_BYTES if PAGE_BYTES in said else min(said, default=PAGE_BYTES)
        view = memoryview(data)
        self._pages: dict[int, bytes | memoryview] = {
            n // self.size + 1: view[n : n + self.size] for n in range(0, len(data), self.size)
        }
        self._read_log(frames)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return iter(self._pages.values())

    def listed(self) -> Iterator[Values]:
        """The rows that the leaves of tables list."""
        for number, page in self._pages.items():
            at = HEADER_BYTES if number == 1 else 0
            if page[at : at + 1] == bytes([TABLE_LEAF]):
                count = min(int.from_bytes(page[at + 3 : at + 5], "big"), max(len(page) - at - 8, 0) // 2)
                for start in dict.fromkeys(struct.unpack_from(f">{count}H", page, at + 8)):
                    if (values := self._row(page, start)) is not None:
                        yield values

    def found(self) -> Iterator[Values]:
        """The rows that can be found by trying every place, also if a list of rows is damaged."""
        for page in self:
            for match in _RECORD.finditer(page):
                for start in range(max(match.start() - 12, 0), match.start() - 1):
                    ends = _varint(page, _varint(page, start)[1])[1]
                    if ends == match.start() and (values := self._row(page, start)) is not None:
                        yield values

    def _row(self, page: bytes | memoryview, start: int) -> Values | None:
        """The row that begins there, or None."""
        length, at = _varint(page, start)
        number, at = _varint(page, at)
        most = self.size - 35
        kept = length
        if length > most:
            least = (self.size - 12) * 32 // 255 - 23
            kept = least + (length - least) % (self.size - 4)
            kept = kept if kept <= most else least
        payload = [page[at : at + kept]]
        missing, follows, seen = length - kept, int.from_bytes(page[at + kept : at + kept + 4], "big"), 0
        while missing > 0 and follows in self._pages and seen <= len(self._pages):
            part = self._pages[follows][4 : 4 + missing]
            payload.append(part)
            missing, follows, seen = missing - len(part), int.from_bytes(self._pages[follows][:4], "big"), seen + 1
        values = _values(b"".join(payload))
        if values and values[0] is None:
            values[0] = number  # where a table calls its rows' numbers by a name, that column is empty
        return values

    def _read_log(self, log: bytes) -> None:
        """Take the pages of the log up to its last commit; what follows was never said to be written."""
        commits = _commits(log, self.size)
        if is_last_torn(commits):
            commits.pop()
        for pages, _ in commits:
            self._pages.update(pages)


def is_log_whole(path: Path) -> bool:
    """Whether SQLite will read all commits of a database's log: it stops silently at the first wrong checksum.

    The last commit may be torn: a process that is killed leaves a frame's header without its page, and it had not yet
    said that anything was written.
    """
    log = _log_of(path)
    size = int.from_bytes(log[8:12], "big")
    commits = _commits(log, size if size in SIZES else PAGE_BYTES)
    return all(is_right for _, is_right in commits) or is_last_torn(commits)


def is_last_torn(commits: list[tuple[dict[int, bytes], bool]]) -> bool:
    """Whether the last commit alone has a wrong checksum."""
    return [is_right for _, is_right in commits[-2:]] in ([True, False], [False])


def _commits(log: bytes, size: int) -> list[tuple[dict[int, bytes], bool]]:
    """The pages of each commit, and whether all checksums up to its end are right."""
    commits: list[tuple[dict[int, bytes], bool]] = []
    sums = _sums(log[:4], log[:24], (0, 0)) if len(log) >= LOG_HEADER_BYTES else (0, 0)
    is_right = log[24:32] == struct.pack(">II", *sums)
    pages: dict[int, bytes] = {}
    for frame in _frames(log, size):
        sums = _sums(log[:4], frame[:8] + frame[FRAME_HEADER_BYTES:], sums)
        is_right = is_right and frame[16:24] == struct.pack(">II", *sums)
        number, pages_in_all = struct.unpack_from(">II", frame)
        pages[number] = frame[FRAME_HEADER_BYTES:]
        if pages_in_all:
            commits.append((pages, is_right))
            pages = {}
    return commits


def _log_of(path: Path) -> bytes:
    log = path.with_name(f"{path.name}-wal")
    return log.read_bytes() if log.is_file() else b""


def _frames(log: bytes, size: int) -> list[bytes]:
    """The frames of a log since its last restart: those with its salts, and the bytes between them."""
    length = FRAME_HEADER_BYTES + size
    found = [log[at : at + length] for at in range(LOG_HEADER_BYTES, len(log) - length + 1, length)]
    salts = log[16:24]
    if found and all(frame[8:16] != salts for frame in found):
        salts = found[0][8:16]  # the log's own ones are damaged
    last = max((n for n, frame in enumerate(found, 1) if frame[8:16] == salts), default=0)
    return found[:last]


def _sums(magic: bytes, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    """The checksum of a log, which goes on from one frame to the next."""
    first, second = sums
    words = struct.unpack(f"{'>' if magic[-1:] == LOG_MAGIC_BIG[-1:] else '<'}{len(data) // 4}I", data)
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _values(payload: bytes) -> Values | None:
    """A record's values; one whose bytes are missing is shorter, text is decoded as far as it can be."""
    head, at = _varint(payload, 0)
    kinds: list[int] = []
    while at < min(head, len(payload)):
        kind, at = _varint(payload, at)
        kinds.append(kind)
    if at != head or not kinds:
        return None
    values: Values = []
    for kind in kinds:
        size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        values.append(_value(kind, payload[at : at + size]))
        at += size
    return values


def _value(kind: int, data: bytes) -> Any:
    if kind >= 12:
        return data.decode("utf-8", "replace") if kind % 2 else data
    if kind == 7 and len(data) == 8:
        return struct.unpack(">d", data)[0]
    if kind in _INTEGERS:
        return int.from_bytes(data, "big", signed=True)
    return {8: 0, 9: 1}.get(kind)


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for n in range(9):
        byte = data[at + n] if at + n < len(data) else 0
        if n == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + n + 1
    raise AssertionError
