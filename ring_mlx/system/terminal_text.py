"""Makes text safe for a terminal: no control sequences, no bidirectional overrides.

Model output, names of tensors and files, templates and configuration come from others. In a terminal, escape sequences
in them would move the cursor or rename the window, and directional overrides would show another text than there is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

# Control characters but tab and line feed, those of C1, halves of surrogate pairs, and what is invisible and changes how
# the rest is shown. What letters need stays: joiners (emoji, Persian, Indic scripts) and variation selectors.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"  # invisible, or a direction
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"  # ends of lines, overrides, isolates, fillers
    "\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # shorthand, music
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"  # tags, and what has no meaning yet
    "]"
)


def harmless(text: str, is_name: bool = False) -> str:
    r"""The text with such characters made visible, as ``\x1b`` or ``\u202e``, and of a name line ends and tabs too.

    Windows' line ends become plain ones.
    """
    if is_name:
        return _UNSAFE.sub(_escape, text).replace("\n", r"\n").replace("\t", r"\t")
    return _UNSAFE.sub(_escape, text.replace("\r\n", "\n"))


def for_output(text: str, stream: TextIO | None = None) -> str:
    """The text as it goes to a stream (standard output): harmless at a terminal, else as it is."""
    return harmless(text) if (stream or sys.stdout).isatty() else text


def is_seen(text: str) -> bool:
    """Whether anything of a text can be seen; control characters and what has no width cannot."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


shown_bars: list[Any] = []  # each has hide() and show()


@contextmanager
def beside_bars() -> Iterator[None]:
    """Take all bars off the terminal while lines are printed."""
    bars = list(shown_bars)
    for bar in bars:
        bar.hide()
    try:
        yield
    finally:
        for bar in bars:
            bar.show()


def note(text: str) -> None:
    """Print a line on standard error; it is lost where that is closed or full."""
    with suppress(OSError), beside_bars():
        print(harmless(f"ring-mlx: {text}"), file=sys.stderr, flush=True)


def harmless_json(value: Any, indent: int | None = None) -> str:
    """JSON of the value, letters as they are and the characters of `harmless` escaped."""
    return _UNSAFE.sub(_json_escape, json.dumps(value, ensure_ascii=False, indent=indent))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if ord(found[0]) != 0x7F else "\\u007f"


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
