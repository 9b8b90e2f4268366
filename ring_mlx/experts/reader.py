"""Reads experts on a few threads and checks their checksums.

A file that shrinks, cannot be read, or does not match its checksum is an error. An expert is checked when it is first
read, and again once its file's size or time has changed; in a layout without checksums a changed file is an error.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ring_mlx.errors import WeightsError
from ring_mlx.experts.layout import DIGEST_CHARACTERS, Piece, Place

THREADS = 4


class ExpertReader:
    """Open files and the threads that read them; a WeightsError if a file cannot be opened."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "experts")
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._verified: dict[Path, set[str]] = {}
        weakref.finalize(self, _close, self._open)
        for file in files:
            try:
                self._open[file] = os.open(file, os.O_RDONLY)
            except OSError as e:
                raise WeightsError(f"{file} cannot be opened ({e.strerror}); check the folder.") from None
            self._stamps[file], self._verified[file] = _stamp(self._open[file]), set()

    def submit(self, what: str, place: Place, buffers: Sequence[Any]) -> Future[int]:
        """Begin to read an expert into memory for each part; the result is the number of bytes.

        ``what`` is its name in errors, always the same for the same expert.
        """
        return self._threads.submit(self._read, what, place, buffers)

    def close(self) -> None:
        self._threads.shutdown()
        _close(self._open)

    def _read(self, what: str, place: Place, buffers: Sequence[Any]) -> int:
        for file in {p.file for p in place.pieces}:
            self._check_stamp(file, what, place.digest is not None)
        total = sum(self._fill(what, piece, [buffers[i] for i in piece.parts]) for piece in place.pieces)
        if place.digest is not None:
            self._verify(what, place, buffers)
        return total

    def _fill(self, what: str, piece: Piece, buffers: list[Any]) -> int:
        """Read one piece into its buffers, with one call if the system gives all at once."""
        wanted = sum(b.nbytes for b in buffers)
        got = 0
        while got < wanted:
            try:
                n = _read_into(self._open[piece.file], _rest(buffers, got), piece.offset + got)
            except OSError as e:
                raise WeightsError(f"{piece.file} cannot be read at {what} ({e.strerror}); check the disk.") from None
            if n == 0:
                raise WeightsError(
                    f"{piece.file} ends within {what}, {wanted - got} bytes short; download or convert it again."
                )
            got += n
        return wanted

    def _check_stamp(self, file: Path, what: str, has_digest: bool) -> None:
        """Notice a file that was changed since it was opened."""
        stamp = _stamp(self._open[file])
        with self._lock:
            if stamp == self._stamps[file]:
                return
            if not has_digest:
                raise WeightsError(f"{file} was changed while {what} was needed of it; start again.")
            self._stamps[file] = stamp
            self._verified[file].clear()

    def _verify(self, what: str, place: Place, buffers: Sequence[Any]) -> None:
        known = self._verified[place.pieces[0].file]
        if what in known:
            return
        digest = hashlib.sha256()
        for piece in place.pieces:
            for i in piece.parts:
                digest.update(buffers[i])
        if digest.hexdigest()[:DIGEST_CHARACTERS] != place.digest:
            raise WeightsError(
                f"{place.pieces[0].file} is damaged at {what} (its checksum is not the one noted); download or convert "
                "it again."
            )
        with self._lock:
            known.add(what)


def _read_into(descriptor: int, buffers: list[Any], offset: int) -> int:
    """Fill buffers from a file as far as one call goes; returns how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, offset)
    data = os.pread(descriptor, buffers[0].nbytes, offset)
    buffers[0][: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def _rest(buffers: Sequence[Any], skip: int) -> list[Any]:
    """The buffers without their first ``skip`` bytes."""
    out = []
    for b in buffers:
        if skip < b.nbytes:
            out.append(b[skip:])
        skip = max(0, skip - b.nbytes)
    return out


def _close(opened: dict[Path, int]) -> None:
    for descriptor in opened.values():
        with suppress(OSError):
            os.close(descriptor)
    opened.clear()


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
