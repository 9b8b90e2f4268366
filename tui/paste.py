"""Separates pasted text from keys: nothing in a paste acts as a key, whatever bytes it holds.

Textual's parser passes the rest of a paste on as keys once it has met an escape in it.
"""

from __future__ import annotations

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Generator, Iterable
from functools import partial
from time import monotonic

from textual import constants, events
from textual._xterm_parser import BRACKETED_PASTE_END, BRACKETED_PASTE_START, XTermParser
from textual.drivers import linux_driver
from textual.message import Message

from ring_mlx import harmless

START, END = BRACKETED_PASTE_START, BRACKETED_PASTE_END
SPLIT_S = 0.5  # how long the rest of a marker may take; one that begins like a key is waited for as long as for a key
FORGET_S = 1.0  # how long after that the rest is still known
QUIET_S = 0.05  # a paste is over once nothing has followed its end marker for so long
BURST_CHARACTERS = 1024


class PasteParser(XTermParser):
    """Finds the markers of a paste itself, also where they come in pieces, and cleans what is between them.

    An end marker in a burst that goes on to another one is a part of what was pasted.
    """

    def __init__(self, debug: bool = False) -> None:
        self._pasted: list[str] | None = None  # of the paste at hand
        self._has_ended = False  # it has met an end marker, which may not be its last one
        self._held, self._given, self._until = "", 0, 0.0  # what is undecided, how much of it Textual has, till when
        super().__init__(debug)

    def feed(self, data: str) -> Iterable[Message]:
        if not data:  # the end of the input
            yield from super().feed(data)
            return
        self._is_burst = len(data) >= BURST_CHARACTERS
        data, self._held = self._held + data, ""
        while data:
            data = yield from self._keys(data) if self._pasted is None else self._paste(data, self._pasted)

    def tick(self) -> Iterable[Message]:
        yield from super().tick()
        if monotonic() < self._until:
            return
        if self._has_ended:
            held, self._held = self._held, ""
            yield self._ended()
            yield from self.feed(held) if held else ()
        elif self._pasted is None and len(self._held) > self._given:  # it was a key after all
            keys, self._given = self._held[self._given :], len(self._held)
            yield from super().feed(keys)
            if self._timeout_time is not None:
                self._timeout_time = 0.0
                yield from super().tick()
            self._until = monotonic() + FORGET_S
        elif self._pasted is None:
            self._held, self._given = "", 0

    def _keys(self, data: str) -> Generator[Message, None, str]:
        """Pass keys on up to the next paste; returns what follows its marker."""
        keys, marker, rest = data.partition(START)
        given, self._given = self._given, 0
        if marker:
            self._pasted = []
        else:
            self._held = _beginning(keys, START)
            keys = keys.removesuffix(self._held)
            self._given = given if not keys else 0
            is_key = len(self._held) <= 2
            self._until = monotonic() + (constants.ESCAPE_DELAY if is_key else SPLIT_S)
        if keys[given:]:
            yield from super().feed(keys[given:])
        return rest

    def _paste(self, data: str, pasted: list[str]) -> Generator[Message, None, str]:
        """Take pasted text; returns the text after the end of the paste."""
        if self._has_ended:
            if data.startswith(START):
                yield self._ended()
                return data
            if END not in data:
                self._held = data
                self._until = monotonic() + QUIET_S if self._is_burst else self._until
                return ""
            self._has_ended = False
            pasted.append(END)
        text, marker, rest = data.partition(END)
        if marker:
            self._has_ended, self._until = True, monotonic() + QUIET_S
        else:
            self._held = _beginning(text, END)
            text = text.removesuffix(self._held)
        pasted.append(text)
        return rest

    def _ended(self) -> events.Paste:
        text, self._pasted, self._has_ended = "".join(self._pasted or ()), None, False
        return events.Paste(harmless(text.replace("\r\n", "\n").replace("\r", "\n")))


def _beginning(text: str, marker: str) -> str:
    """The longest beginning of a marker, but not all of it, with which a text ends."""
    return next((marker[:n] for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), "")


def _decoder(encoding: str) -> partial[IncrementalDecoder]:
    return partial(getincrementaldecoder(encoding), "replace")


def keep_apart() -> None:
    """Have Textual's driver, of Linux and macOS, read with this parser, and bytes that are no text as a sign."""
    linux_driver.XTermParser = PasteParser  # type: ignore[attr-defined]
    linux_driver.getincrementaldecoder = _decoder  # type: ignore[attr-defined, assignment]
