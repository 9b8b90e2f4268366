"""Keeps commands running when standard input, output or error is closed or cannot be written."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


def replace_closed() -> None:
    """Open the null device for streams that the shell closed; else the next opened file would get what is printed."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < len(STREAMS):
        pass
    os.close(handle)
    for name, mode in STREAMS.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def give_up_unwritable() -> None:
    """Send unwritten output of full or closed streams to the null device, or Python would complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
