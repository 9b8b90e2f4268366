"""What the terminal and signals ask of the chat before there is a screen: plain mode, an end that saves everything."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

AGAIN_S = 2.0  # within which a second Ctrl+C quits


def wanted_by_terminal() -> str:
    """A line that says so if the terminal cannot place letters and needs plain mode, or nothing."""
    term = os.environ.get("TERM", "")
    is_dumb = term in ("dumb", "unknown")
    return f"[terminal] TERM={term} shows no screens; this is plain mode, /help lists its commands." if is_dumb else ""


class SignalledExit(BaseException):
    """A signal asked the process to end; it is raised wherever the main thread is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Raise `SignalledExit` for SIGTERM and SIGHUP, unless they are ignored, so that everything is saved."""

    def end(number: int, _: object) -> None:
        raise SignalledExit(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let no further Ctrl+C keep the chat from saving; a model that is being loaded may take seconds to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
