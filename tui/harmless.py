"""Text that cannot act on the terminal; knows characters only."""

from __future__ import annotations

_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd") | {ord("\r"): None}


def harmless(text: str) -> str:
    """The text with control characters replaced, since escape sequences would reach the terminal and act there.

    Line feeds and tabs stay, carriage returns go.
    """
    return text.translate(_CONTROLS)
