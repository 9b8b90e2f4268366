"""Requests with much to parse, render and encode: one at a time, with pauses, to leave the processor to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ring_mlx.serve.failures import GoneError

LARGE_BYTES, POLL_S = 1 << 16, 0.05
# After a large request the next one waits for so many times as long as it took, but not longer than so many seconds.
REST, REST_S = 3.0, 0.3


class LargeTurns:
    """The turns of a server's large requests."""

    def __init__(self) -> None:
        self._large, self._rests_until = threading.Lock(), 0.0

    @contextmanager
    def turn(self, size: int, gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for this request's turn, if so many bytes are large.

        Raises GoneError if the client leaves while it waits.
        """
        if size <= LARGE_BYTES:
            yield
            return
        while not self._large.acquire(timeout=POLL_S):
            if gone():
                raise GoneError
        try:
            while (left := self._rests_until - time.monotonic()) > 0:
                if gone():
                    raise GoneError
                time.sleep(min(left, POLL_S))
            started = time.monotonic()
            try:
                yield
            finally:
                ended = time.monotonic()
                self._rests_until = ended + min(REST * (ended - started), REST_S)
        finally:
            self._large.release()
