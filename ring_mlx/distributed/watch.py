"""Notices when another rank is gone, over separate sockets.

A rank that is killed closes its socket; one that hangs or is cut off stops beating. Rank 0 hears all others, and they
hear it. Whoever misses a rank says which in one line and ends its process, since the thread that computes may wait in
MLX for ever.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from ring_mlx.distributed.ending import end

BEAT_S, SILENT_S, GRACE_S = 1.0, 6.0, 2.0
BEAT, BYE, FAILED, GONE = b".", b"x", b"f", b"g"


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket on any free port of an address, and the word that callers must give."""
    return socket.create_server((address, 0), backlog=64), secrets.token_hex(8)


def accept(server: socket.socket, word: str, size: int, timeout_s: float = 60.0) -> dict[int, socket.socket]:
    """The sockets of ranks 1 to ``size`` - 1, once all have called.

    Raises:
        OSError: If one does not call in time.
    """
    server.settimeout(timeout_s)
    peers: dict[int, socket.socket] = {}
    with server:
        while len(peers) < size - 1:
            peer, _ = server.accept()
            rank = _rank_of(peer, word)
            if rank is not None and 0 < rank < size:
                peers[rank] = peer
            else:
                peer.close()
    return peers


def _rank_of(peer: socket.socket, word: str) -> int | None:
    """What a caller says of itself, or None where it is no rank of ours."""
    peer.settimeout(SILENT_S)
    with suppress(OSError, ValueError):
        said, number = peer.makefile("rb").readline(64).decode("ascii").split()
        return int(number) if secrets.compare_digest(said, word) else None
    return None


def call(address: str, port: int, word: str, rank: int, timeout_s: float = 60.0) -> dict[int, socket.socket]:
    """The socket to rank 0.

    Raises:
        OSError: If it cannot be reached.
    """
    peer = socket.create_connection((address, port), timeout_s)
    peer.sendall(f"{word} {rank}\n".encode())
    return {0: peer}


class Watch:
    """Beats to its peers and ends the process when one is missing.

    Args:
        rank: This process's.
        peers: A socket for each rank that it hears.
        names: What to call each rank.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], names: Sequence[str]) -> None:
        self.rank, self._peers, self._names = rank, dict(peers), names
        self._failed: set[int] = set()
        self._due = dict.fromkeys(peers, time.monotonic() + SILENT_S)
        self._closing = threading.Event()
        for peer in peers.values():
            peer.settimeout(SILENT_S)
        self._thread = threading.Thread(target=self._run, name="ring-mlx watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and tell the others that this rank is done."""
        self._stop(BYE)
        for peer in self._peers.values():
            peer.close()

    def fail(self) -> None:
        """Stop watching, and tell the others that an error ends this rank; its end closes the sockets."""
        self._stop(FAILED)

    def _stop(self, last_word: bytes) -> None:
        self._closing.set()
        self._thread.join(2 * BEAT_S)
        self._tell(last_word)

    def _run(self) -> None:
        beat = 0.0
        while not self._closing.wait(0 if self._peers else BEAT_S / 4):
            if time.monotonic() >= beat:
                self._tell(BEAT)
                beat = time.monotonic() + BEAT_S
            asked = time.monotonic()  # before, since other threads may keep this one from going on afterwards
            peers = list(self._peers.items())
            ready = select.select([p for _, p in peers], [], [], BEAT_S / 4)[0] if peers else []
            for rank, peer in peers:
                if peer in ready:
                    self._hear(rank, peer)
            late = [rank for rank, due in self._due.items() if asked > due]
            if late:
                self._end(
                    late[0], "ended with an error" if late[0] in self._failed else f"is silent for {SILENT_S:.0f} s"
                )

    def _hear(self, rank: int, peer: socket.socket) -> None:
        try:
            data = peer.recv(256)
        except OSError:
            data = b""
        if GONE in data:
            named = data[data.index(GONE) + 1 :][:1]
            self._end(named[0] if named else rank, "is gone")
        elif BYE in data:
            del self._peers[rank], self._due[rank]
        elif FAILED in data:
            # This rank has met the same error and says so itself, or ends in a moment.
            self._failed.add(rank)
            self._due[rank] = time.monotonic() + GRACE_S
            del self._peers[rank]
        elif not data:
            self._end(rank, "is gone")
        else:
            self._due[rank] = time.monotonic() + SILENT_S

    def _tell(self, word: bytes) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(word)
            except OSError:
                continue  # what has become of it is heard, not felt

    def _end(self, rank: int, what: str) -> None:
        if self._closing.is_set():
            return
        self._tell(GONE + bytes([rank]))
        end(f"rank {rank} ({self._names[rank]}) {what}, so rank {self.rank} ends too; look there and start all again.")
