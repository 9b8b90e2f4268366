"""Rows as stored: sealed with a checksum when written, read whatever they hold.

A seal is a BLAKE2 checksum over a row's values as Python writes them in ASCII. A row whose seal does not fit is damaged: what can be
read of it is shown with a mark, and saved again without a seal, so that the mark stays.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from ring_mlx import whole_text

SEAL_BYTES, DEEPEST = 8, 100
BROKEN = b""
MARK = "(damaged)"


def seal(values: Sequence[Any]) -> bytes:
    """The checksum of a row's values, which are such as SQLite gives back."""
    return hashlib.blake2b(ascii(tuple(values)).encode(), digest_size=SEAL_BYTES).digest()


def fits(found: object, values: Sequence[Any]) -> bool:
    """Whether the seal found in a row is that of its values."""
    return isinstance(found, bytes) and found != BROKEN and found == seal(values)


def text(value: object) -> str:
    """A column's text, whatever it holds."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def number(value: object) -> float:
    """A column's number, 0 where it holds none that can be reckoned with."""
    try:
        found = float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0
    return found if math.isfinite(found) else 0.0


def unpacked(value: object) -> Any:
    """What a column of JSON holds.

    Raises:
        ValueError: If it is no JSON, or too deep.
    """
    packed = text(value)
    if packed == "[]":
        return []
    try:
        found = json.loads(packed)
        if packed.count("[") + packed.count("{") > DEEPEST and _depth(found) > DEEPEST:
            raise ValueError("the JSON is too deep")
    except RecursionError:
        raise ValueError("the JSON is too deep") from None
    return whole_text(found) if "\\ud" in packed.lower() else found


def _depth(value: Any) -> int:
    """How many levels a value of JSON has, at most one more than `DEEPEST`."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        held = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level, depth = [v for values in held for v in values], depth + 1
    return depth


def marked(said: str) -> str:
    """A text that is shown as damaged."""
    return said if said.startswith(MARK) else f"{MARK} {said}".rstrip()
