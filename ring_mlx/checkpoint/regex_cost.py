"""Refuses regular expressions that may take too long, since the tokenizer library backtracks and cannot be stopped.

For each sequence of pieces it counts the repeats that may be retried because something after them can fail, and the ways
in which options and alternatives combine. One such repeat takes time that grows with the square of the text, two with
its cube; a repeat within a repeat doubles the time with every letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_LETTERS, MAX_DEPTH, MAX_REPEATS, MAX_WAYS, MAX_SIZE = 4_000, 16, 1, 4_096, 20_000
FEW = 64
EMPTY = "it matches the empty text"
_QUANTIFIER = re.compile(r"[*+?]|\{(\d{0,6})(?:(,)(\d{0,6}))?\}")
_GROUP = re.compile(r"\?(?::|=|!|>|<=|<!|[imx-]{1,6}:|<[A-Za-z_]\w{0,30}>)")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w ]{1,40}\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|.)", re.DOTALL
)


class _Cost(NamedTuple):
    """The cost of a piece."""

    repeats: int = 0  # that may be retried
    ways: int = 1  # to match it
    least: int = 0  # letters that it takes at least, 0 or 1
    size: int = 1  # its length as the engine unrolls it
    varies: bool = False  # whether it can match in several ways
    takes: bool = True  # whether it never matches the empty text


class _Refused(Exception):
    pass


def regex_problem(pattern: object, may_be_empty: bool = True) -> str | None:
    """Why a pattern is not used, or None; ``may_be_empty`` allows one that matches the empty text."""
    if not isinstance(pattern, str) or len(pattern) > MAX_LETTERS:
        return "not a text, or too long"
    try:
        reader = _Reader(pattern)
        cost = reader.alternatives(0)
        if reader.at != len(pattern):
            raise _Refused("an unmatched bracket")
    except _Refused as e:
        return str(e)
    if not cost.takes and not may_be_empty:
        return EMPTY
    return "too large" if cost.size > MAX_SIZE else None


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def alternatives(self, depth: int) -> _Cost:
        """Up to the end or a closing bracket."""
        if depth > MAX_DEPTH:
            raise _Refused("nested too deeply")
        found = [self._sequence(depth)]
        while self._next() == "|":
            self.at += 1
            found.append(self._sequence(depth))
        return _Cost(
            max(c.repeats for c in found),
            min(MAX_WAYS + 1, sum(c.ways for c in found)),
            min(c.least for c in found),
            sum(c.size for c in found),
            len(found) > 1 or any(c.varies for c in found),
            all(c.takes for c in found),
        )

    def _sequence(self, depth: int) -> _Cost:
        pieces = []
        while self._next() not in ("", "|", ")"):
            pieces.append(self._quantified(self._piece(depth)))
        # What is retried is what stands before something that can fail; the rest may be, by what follows the group.
        last = max((i for i, c in enumerate(pieces) if c.least), default=0)
        if sum(c.repeats for c in pieces[:last]) > MAX_REPEATS or _ways(pieces[:last]) > MAX_WAYS:
            raise _Refused("it may take too long")
        return _Cost(
            sum(c.repeats for c in pieces),
            _ways(pieces),
            min(1, sum(c.least for c in pieces)),
            sum(c.size for c in pieces),
            any(c.varies for c in pieces),
            any(c.takes for c in pieces),
        )

    def _piece(self, depth: int) -> _Cost:
        letter = self._next()
        if letter == "(":
            return self._group(depth)
        if letter == "[":
            self._set(depth)
        elif letter == "\\":
            return self._escape()
        else:
            self.at += 1
            # An anchor takes no letter, but it can fail.
            return _Cost(least=1, takes=letter not in "^$")
        return _Cost(least=1)

    def _group(self, depth: int) -> _Cost:
        self.at += 1
        kind = ":"
        if self._next() in ("?", "*"):
            found = _GROUP.match(self.pattern, self.at)
            if found is None:
                raise _Refused("a kind of group that is not used in tokenizers")
            self.at, kind = found.end(), found[0]
        cost = self.alternatives(depth + 1)
        if self._next() != ")":
            raise _Refused("an unmatched bracket")
        self.at += 1
        # Whether something stands ahead or behind can fail as well.
        return cost._replace(least=1, takes=False) if kind in ("?=", "?!", "?<=", "?<!") else cost

    def _set(self, depth: int) -> None:
        """A class of letters, which may hold others."""
        level = 0
        while True:
            letter = self._next()
            if letter == "":
                raise _Refused("an unmatched bracket")
            self.at += 2 if letter == "\\" else 1
            level += {"[": 1, "]": -1}.get(letter, 0)
            if letter == "[" and self.pattern[self.at : self.at + 1] == "^":
                self.at += 1
            if letter == "[" and self._next() == "]":
                self.at += 1
            if level == 0:
                return
            if level > MAX_DEPTH:
                raise _Refused("nested too deeply")

    def _escape(self) -> _Cost:
        found = _ESCAPE.match(self.pattern, self.at)
        if found is None:
            raise _Refused("a lone backslash")
        if found[0][1] in "123456789kgKX":
            raise _Refused("a reference to another part")
        self.at = found.end()
        return _Cost(least=1, takes=found[0][1] not in "bBAzZGyY")

    def _quantified(self, cost: _Cost) -> _Cost:
        found = _QUANTIFIER.match(self.pattern, self.at)
        if found is None:
            return cost
        self.at = found.end()
        least, most = _bounds(found)
        possessive = self._next() == "+" and found[0] in "*+?"
        if self._next() == "?" or possessive:
            self.at += 1
        size = cost.size * (most or least or 1)
        if size > MAX_SIZE:
            raise _Refused("too large")
        takes = cost.takes and least > 0
        if possessive:
            return self._quantified(_Cost(0, 1, min(cost.least, least), size, least != most, takes))
        several = most is None or most - least > FEW
        ways = 1 if several else min(MAX_WAYS + 1, cost.ways * (1 + (most or 0) - least))
        # A repeat of what matches in several ways matches in exponentially many.
        repeats = MAX_REPEATS + 1 if cost.varies and most != 1 else cost.repeats + several
        found_cost = _Cost(repeats, ways, min(cost.least, least), size, cost.varies or least != most, takes)
        return self._quantified(found_cost)

    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]


def _ways(pieces: Sequence[_Cost]) -> int:
    """Of all together, or more than are allowed."""
    ways = 1
    for cost in pieces:
        ways = min(MAX_WAYS + 1, ways * cost.ways)
    return ways


def _bounds(found: re.Match[str]) -> tuple[int, int | None]:
    """The least and the most repeats that a quantifier asks for; None is any number."""
    if found[0] in "*+?":
        return int(found[0] == "+"), 1 if found[0] == "?" else None
    if not found[1] and not found[3]:
        raise _Refused("braces without a number")
    least = int(found[1] or 0)
    most = least if found[2] is None else int(found[3]) if found[3] else None
    if most is not None and most < least:
        raise _Refused("a repeat of more than its most")
    return least, most
