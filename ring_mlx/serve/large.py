"""Requests with much to parse, render and encode: one at a time, with pauses, to leave the processor to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ring_mlx.engine.fairness import ClientTurns
from ring_mlx.serve.failures import GoneError

LARGE_BYTES, POLL_S = 1 << 16, 0.05
# After a large request the next one waits for so many times as long as it took, but not longer than so many seconds.
REST, REST_S = 3.0, 0.3


class LargeTurns:
    """The turns of a server's large requests."""

    def __init__(self) -> None:
        self._changed, self._rests_until = threading.Condition(), 0.0
        self._waiting: list[tuple[str, object]] = []
        self._turns, self._is_taken = ClientTurns(), False

    @contextmanager
    def turn(self, size: int, gone: Callable[[], bool], client: str = "") -> Iterator[None]:
        """Wait for this request's turn, if so many bytes are large; of several, clients take turns.

        Raises GoneError if the client leaves while it waits.
        """
        if size <= LARGE_BYTES:
            yield
            return
        self._wait((client, object()), gone)
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
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def _wait(self, mine: tuple[str, object], gone: Callable[[], bool]) -> None:
        with self._changed:
            self._waiting.append(mine)
            try:
                while self._is_taken or mine is not min(self._waiting, key=lambda one: self._turns.last(one[0])):
                    self._changed.wait(POLL_S)
                    if gone():
                        raise GoneError
                self._is_taken = True
                self._turns.take(mine[0], (client for client, _ in self._waiting if client != mine[0]))
            finally:
                self._waiting.remove(mine)
