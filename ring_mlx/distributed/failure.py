"""The errors of this package, and the end of a process that cannot go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from ring_mlx.errors import RingError

LOST = 3  # exit code of a rank that has lost another, or its launcher

_first: list[Callable[[], object]] = []


class DistributedError(RingError, origin="distributed"):
    """Processes cannot work together: no group, a model that cannot be cut, a rank that differs or is gone."""


class LostError(DistributedError):
    """A rank is gone while the others work; the command ends with `LOST`."""


def before_end(action: Callable[[], object]) -> None:
    """Call an action, which must be short, before `end` ends this process."""
    _first.append(action)


def end(text: str | None) -> None:
    """End this process at once, with a line: a thread may wait in MLX for ever, where no exception reaches it."""
    if text is not None:
        with suppress(OSError):
            os.write(2, f"ring-mlx: [distributed] {text}\n".encode())
    for action in reversed(_first):
        with suppress(Exception):
            action()
    os._exit(LOST)
