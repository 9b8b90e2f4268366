"""Ends this process when another one is gone: rank 0 and each other rank watch each other, and all watch their launcher.

A process that is killed closes its connection; one that hangs or is cut off stops beating. Each connection has a thread
that sends and receives, so that a long step does not look like a loss.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ring_mlx.distributed.failure import before_end, end

BEAT_S, SILENT_S, GRACE_S = 1.0, 6.0, 2.0
# Between ranks.
BEAT, BYE, FAILED, GONE = b".", b"x", b"f", b"g"
# From the launcher to a rank, and back among the text of its standard error.
START, INTERRUPT = b"s", b"i"
ALIVE, JOINED = b"\x16", b"\x06"
# Says in the environment that there is a launcher, and names temporary files to be removed at the end.
VARIABLE = "RING_MLX_LAUNCHER"


class _Heartbeat:
    """Sends beats to peers and receives theirs, on a thread; peers are file descriptors to read from and to write to."""

    def __init__(self, peers: Mapping[int, tuple[int, int]], beat: bytes) -> None:
        self._peers, self._beat = dict(peers), beat
        self._due = dict.fromkeys(peers, time.monotonic() + SILENT_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ring-mlx heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beat_at = 0.0
        while not self._closing.wait(0 if self._peers else BEAT_S / 4):
            if time.monotonic() >= beat_at:
                self._tell(self._beat)
                beat_at = time.monotonic() + BEAT_S
            asked = time.monotonic()  # before, since other threads may keep this one from going on afterwards
            peers = {source: number for number, (source, _) in self._peers.items()}
            for source in select.select(peers, [], [], BEAT_S / 4)[0] if peers else ():
                self._due[peers[source]] = time.monotonic() + SILENT_S
                try:
                    data = os.read(source, 256)
                except OSError:
                    data = b""
                self._hear(peers[source], data)
            late = [number for number, due in self._due.items() if asked > due]
            if late:
                self._miss(late[0])

    def _tell(self, word: bytes) -> None:
        for _, target in self._peers.values():
            with suppress(OSError, ValueError):  # what has become of it is heard, not felt
                # Where nobody empties a pipe, this thread must not wait.
                if select.select([], [target], [], 0)[1]:
                    os.write(target, word)

    def _hear(self, number: int, data: bytes) -> None:
        raise NotImplementedError

    def _miss(self, number: int) -> None:
        raise NotImplementedError


class RankHeartbeat(_Heartbeat):
    """Between ranks: ends this process when a peer is missing, and names its host."""

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], names: Sequence[str]) -> None:
        self.rank, self._names, self._sockets = rank, names, list(peers.values())
        self._failed: set[int] = set()
        super().__init__({number: (s.fileno(), s.fileno()) for number, s in peers.items()}, BEAT)

    def close(self) -> None:
        """Stop, and tell the others that this rank is done."""
        self._stop(BYE)
        for peer in self._sockets:
            peer.close()

    def fail(self) -> None:
        """Stop, and tell the others that an error ends this rank; its end closes the sockets."""
        self._stop(FAILED)

    def _stop(self, last_word: bytes) -> None:
        self._closing.set()
        self._thread.join(2 * BEAT_S)
        self._tell(last_word)

    def _hear(self, number: int, data: bytes) -> None:
        if GONE in data:
            named = data[data.index(GONE) + 1 :][:1]
            self._end(named[0] if named else number, "is gone")
        elif BYE in data:
            del self._peers[number], self._due[number]
        elif FAILED in data:
            # This rank has met the same error and says so itself, or ends in a moment.
            self._failed.add(number)
            self._due[number] = time.monotonic() + GRACE_S
            del self._peers[number]
        elif not data:
            self._end(number, "is gone")

    def _miss(self, number: int) -> None:
        self._end(number, "ended with an error" if number in self._failed else f"is silent for {SILENT_S:.0f} s")

    def _end(self, rank: int, what: str) -> None:
        if self._closing.is_set():
            return
        self._tell(GONE + bytes([rank]))
        end(f"rank {rank} ({self._names[rank]}) {what}, so rank {self.rank} ends too; look there and start all again.")


class LauncherHeartbeat(_Heartbeat):
    """From a rank to ``ring-mlx launch``, by what was standard input and by standard error; ends it when that is gone."""

    def __init__(self, source: int) -> None:
        self.all_started = threading.Event()
        super().__init__({0: (source, 2)}, ALIVE)

    def joined(self) -> None:
        """From now on tell the launcher that this rank is connected, repeatedly, since a full pipe may lose one message."""
        self._beat = JOINED
        self._tell(JOINED)

    def _hear(self, number: int, data: bytes) -> None:
        if not data:
            end(None)
        if START in data:
            self.all_started.set()
        if INTERRUPT in data:
            os.kill(os.getpid(), signal.SIGINT)

    def _miss(self, number: int) -> None:
        end(f"the launcher is silent for {SILENT_S:.0f} s, so this rank ends; start all again.")


def of_launcher() -> LauncherHeartbeat | None:
    """The heartbeat to this process's launcher, or None without one; call once, on the main thread."""
    files = os.environ.pop(VARIABLE, None)
    if files is None:
        return None
    source, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for file in filter(None, files.split(os.pathsep)):
        before_end(Path(file).unlink)
        atexit.register(Path(file).unlink, missing_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; SIGINT comes from here only
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return LauncherHeartbeat(source)
