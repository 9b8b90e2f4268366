"""Ends a process that cannot go on, even if its other threads wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

LOST = 3

_first: list[Callable[[], object]] = []


def before_end(action: Callable[[], object]) -> None:
    """Call an action, which must be short, before `end` ends this process."""
    _first.append(action)


def end(text: str | None, code: int = LOST) -> None:
    """End this process at once: a thread that computes may wait in MLX for ever, and no exception reaches it.

    Args:
        text: What to say in one line, or None.
        code: The exit code.
    """
    if text is not None:
        with suppress(OSError):
            os.write(2, f"ring-mlx: [distributed] {text}\n".encode())
    for action in reversed(_first):
        with suppress(Exception):
            action()
    os._exit(code)
