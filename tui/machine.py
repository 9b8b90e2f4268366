"""What the machine and the user's keys are, as the screens need it; knows no model."""

from __future__ import annotations

import os

from tui.config.schema import PROMPT_KEYS


def memory_bytes() -> int:
    """The machine's memory, 0 where it is not told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def prompt_keys(keys: dict[str, str]) -> dict[str, str]:
    """The keys of "send" and "new_line"."""
    return {name: keys.get(name, plain) for name, plain in PROMPT_KEYS.items()}
