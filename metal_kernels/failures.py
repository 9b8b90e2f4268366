"""Describes a failure of a kernel in one line, and tells whether it is temporary, such as too little memory."""

from __future__ import annotations

import re

# What MLX and Metal say where memory is short, or where other work is to blame; not of illegal or threadgroup memory.
PASSING = re.compile(
    r"out ?of ?memory|insufficient memory|alloc|MemoryError|resource limit|innocent ?victim|interactivity|submissions ?ignored",
    re.IGNORECASE,
)


def is_passing(problem: str) -> bool:
    """Whether the failure may be temporary: memory was short, or other work on the GPU failed."""
    return PASSING.search(problem) is not None


def said(error: Exception) -> str:
    """An exception in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
