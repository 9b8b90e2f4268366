"""A rank's connection to ``ring-mlx launch``: it sends heartbeats, and ends the rank when the launcher is gone.

Standard input is a pipe from the launcher, at another host by way of ssh. It brings a byte a second. Where it ends, or
brings nothing for a while, the launcher is gone: killed, or cut off. Standard error takes bytes that are no text back.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from ring_mlx.distributed.ending import before_end, end

# Says in the environment that there is a launcher, and names temporary files to be removed at the end.
VARIABLE = "RING_MLX_LIFELINE"
BEAT_S, SILENT_S = 1.0, 6.0
BEAT, START, INTERRUPT = b".", b"s", b"i"
ALIVE, JOINED = b"\x16", b"\x06"


class Lifeline:
    """Reads what the launcher says on a thread of its own.

    Args:
        fd: Where it comes from.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.all_started = threading.Event()
        threading.Thread(target=self._run, name="ring-mlx lifeline", daemon=True).start()

    def joined(self) -> None:
        """Tell the launcher that this rank has found the others."""
        _say(JOINED)

    def _run(self) -> None:
        due, beat = time.monotonic() + SILENT_S, 0.0
        while True:
            if time.monotonic() >= beat:
                _say(ALIVE)
                beat = time.monotonic() + BEAT_S
            asked = time.monotonic()  # before, since other threads may keep this one from going on afterwards
            if select.select([self._fd], [], [], BEAT_S / 4)[0]:
                self._hear(os.read(self._fd, 256))
                due = time.monotonic() + SILENT_S
            elif asked > due:
                end(f"the launcher is silent for {SILENT_S:.0f} s, so this rank ends; start all again.")

    def _hear(self, told: bytes) -> None:
        if not told:
            end(None)
        if START in told:
            self.all_started.set()
        if INTERRUPT in told:
            os.kill(os.getpid(), signal.SIGINT)


def hold() -> Lifeline | None:
    """This process's lifeline, or None where nothing says that there is one; call once, on the main thread."""
    files = os.environ.pop(VARIABLE, None)
    if files is None:
        return None
    fd, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for file in filter(None, files.split(os.pathsep)):
        before_end(Path(file).unlink)
        atexit.register(Path(file).unlink, missing_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; SIGINT comes from here only
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return Lifeline(fd)


def _say(word: bytes) -> None:
    with suppress(OSError):
        # A pipe that nobody empties must not keep this thread from noticing why.
        if select.select([], [2], [], 0)[1]:
            os.write(2, word)
