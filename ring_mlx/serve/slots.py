"""Bounds the number of connections and the bytes of their bodies; beyond that one that waits is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from enum import IntEnum

from ring_mlx.serve.failures import GoneError, busy

SMALL_BYTES = 1 << 16  # bodies up to that are read whatever the others hold


class Stage(IntEnum):
    """What a connection waits for; lower stages are closed first."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    SEND = 3


class Slots:
    """The places of a server's connections, ``most`` at once; ``most_bytes`` are those of all bodies in work."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes, self._lock = most, most_bytes, threading.Lock()
        self._held: dict[socket.socket, int] = {}
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
            if stage is Stage.IDLE:
                self._held.pop(connection, None)

    def hold(self, connection: socket.socket, size: int) -> None:
        """Note how long a body is by now; it counts until its request is answered.

        Raises ApiError 503 if the bodies of requests that are being answered leave no room; GoneError if the place has
        been given away meanwhile.
        """
        if size <= SMALL_BYTES:
            return
        with self._lock:
            if connection not in self._taken:
                raise GoneError
            self._held[connection] = size
            while sum(self._held.values()) > self._most_bytes:
                sending = [c for c in self._held if c is not connection and c in self._waiting]
                if not sending:
                    del self._held[connection]
                    raise busy("the bodies of other requests fill the memory that there is for them; try again.")
                self._close(min(sending, key=self._waiting.__getitem__))

    def work(self, connection: socket.socket) -> None:
        """Note that the client waits for the server. Raises GoneError if the place has been given away meanwhile."""
        with self._lock:
            if connection not in self._taken:
                raise GoneError
            self._waiting.pop(connection, None)

    def free(self, connection: socket.socket) -> None:
        with self._lock:
            self._taken.discard(connection)
            self._waiting.pop(connection, None)
            self._held.pop(connection, None)

    def _close(self, connection: socket.socket) -> None:
        self._taken.discard(connection)
        del self._waiting[connection]
        self._held.pop(connection, None)
        with contextlib.suppress(OSError):  # its thread wakes up and ends
            connection.shutdown(socket.SHUT_RDWR)
