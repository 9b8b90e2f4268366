"""How many connections there may be: where all places are taken, one that waits for its client gives way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from enum import IntEnum

from ring_mlx.serve.failures import GoneError


class Stage(IntEnum):
    """What a connection waits for; the lower stages give way first."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    SEND = 3


class Slots:
    """The places of a server's connections.

    Args:
        most: How many there are.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._taken: set[socket.socket] = set()
        self._waiting: dict[socket.socket, tuple[Stage, float]] = {}

    def take(self, connection: socket.socket) -> bool:
        """Take a place; False if all belong to requests that are being answered."""
        with self._lock:
            if len(self._taken) >= self._most:
                if not self._waiting:
                    return False
                self._close(min(self._waiting, key=self._waiting.__getitem__))
            self._taken.add(connection)
            self._waiting[connection] = Stage.IDLE, time.monotonic()
            return True

    def wait(self, connection: socket.socket, stage: Stage) -> None:
        """Note that the server waits for this client."""
        with self._lock:
            if connection in self._taken:
                self._waiting[connection] = stage, time.monotonic()

    def work(self, connection: socket.socket) -> None:
        """Note that the client waits for the server.

        Raises:
            GoneError: If the place has been given away meanwhile.
        """
        with self._lock:
            if connection not in self._taken:
                raise GoneError
            self._waiting.pop(connection, None)

    def free(self, connection: socket.socket) -> None:
        """Give the place back."""
        with self._lock:
            self._taken.discard(connection)
            self._waiting.pop(connection, None)

    def _close(self, connection: socket.socket) -> None:
        self._taken.discard(connection)
        del self._waiting[connection]
        with contextlib.suppress(OSError):  # its thread wakes up and ends
            connection.shutdown(socket.SHUT_RDWR)
