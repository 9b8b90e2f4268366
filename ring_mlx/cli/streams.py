"""Keeps commands running when standard input, output or error is closed or cannot be written."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


def replace_closed() -> None:
    """Put the null device where a shell has closed a stream, or the next file to be opened would get what is printed."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < len(STREAMS):
        pass
    os.close(handle)
    for name, mode in STREAMS.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def give_up_unwritable() -> None:
    """Send to the null device what a stream did not take, or Python would complain of it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
