"""Removes halves of surrogate pairs from text: JSON escapes and file names can hold them, UTF-8 cannot."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def whole_text(value: T) -> T:
    """The value with each half as U+FFFD, in every text of lists and objects; two halves that fit become one letter."""
    made: object = value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            made = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    elif isinstance(value, list):
        made = [whole_text(v) for v in value]
    elif isinstance(value, dict):
        made = {whole_text(k): whole_text(v) for k, v in value.items()}
    return made  # type: ignore[return-value]
