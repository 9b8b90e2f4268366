"""Finds the tag that ends a thought in text that comes in pieces; knows code spans, not tokens.

A ``</think>`` ends the thought unless it stands in code. What code is follows Markdown, read line by line:

- Inline code is between two runs of as many backticks on one line. After a single run the tag waits for the end of its
  line: another run of that length makes it code, the end of the line makes it the end of the thought.
- A fenced block is between lines that begin with three or more backticks or tildes. A tag in it is passed over.
- Where an answer may come without a thought, a ``<tool_call>`` block counts as code as well.

What is found depends on the text alone, not on how it was cut.
"""

from __future__ import annotations

import re
from typing import NamedTuple

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MARKS = re.compile(f"`+|~~~+|{THINK_END}|{CALL_START}|{CALL_END}|\n")
GROWING = re.compile(r"(`+|~+)\Z")


class Place(NamedTuple):
    """Where a tag begins in the text, and how many pieces had come by then."""

    at: int
    pieces: int


class ThoughtEnd:
    """Reads a thought up to its end.

    Args:
        with_calls: Whether a tag in a tool call is no end.
    """

    def __init__(self, with_calls: bool) -> None:
        self.found: Place | None = None
        self.waiting: Place | None = None  # the first tag in code that is still open
        self.passed: Place | None = None  # the first tag in code that has ended
        self._with_calls = with_calls
        self._rest, self._at = "", 0
        self._region, self._fence, self._inline = "", "", 0
        self._is_line_start = True

    @property
    def is_inline(self) -> bool:
        """Whether a tag waits for the end of its line."""
        return self.waiting is not None and not self._region

    def look(self, text: str, pieces: int, last: bool = False) -> int:
        """Take the next text; returns up to where all of it is certain to be before the end of the thought."""
        self._rest += text
        at = 0
        while self.found is None and (mark := MARKS.search(self._rest, at)):
            if mark.end() == len(self._rest) and mark[0][0] in "`~" and not last:
                break
            self._pass(self._rest[at : mark.start()])
            self._take(mark[0], Place(self._at + mark.start(), pieces))
            at = mark.end()
        if self.found is None:
            keep = 0 if last else self._unsure(at)
            self._pass(self._rest[at : len(self._rest) - keep])
            at = len(self._rest) - keep
            if last:
                self._end_line()
        self._rest, self._at = self._rest[at:], self._at + at
        sure = self.found or (self.waiting if self.is_inline else None)
        return sure.at if sure is not None else self._at

    def leave_code(self) -> None:
        """The next tag ends the thought, wherever it stands."""
        self._region, self._fence, self._inline = "", "", 0

    def in_code(self, is_certain: bool) -> Place | None:
        """At the end of the text, the tag in code that has to do as the end, where there is no other.

        Args:
            is_certain: Whether the text began with a thought; if not, code that has ended holds no end.
        """
        return (self.passed or self.waiting) if is_certain else self.waiting

    def _unsure(self, at: int) -> int:
        """Length of the end that may become a mark."""
        run = GROWING.search(self._rest, at)
        tags = (tag_prefix(self._rest[at:], tag) for tag in (THINK_END, CALL_START, CALL_END))
        return max(len(run[0]) if run else 0, *tags)

    def _pass(self, text: str) -> None:
        """Text without marks."""
        if text.strip():
            self._is_line_start = False
            if self._region:
                self._fence = ""

    def _take(self, mark: str, place: Place) -> None:
        if mark == "\n":
            self._end_line()
            return
        starts_line, self._is_line_start = self._is_line_start, False
        if mark[0] in "`~":
            self._take_run(mark, starts_line)
        elif mark == THINK_END:
            self._fence = ""
            if not self._region and not self._inline:
                self.found = place
            self.waiting = self.waiting or place
        elif mark == CALL_START and self._with_calls and not self._region and not self._inline:
            self._region = CALL_START
        elif mark == CALL_END and self._region == CALL_START:
            self._leave()

    def _take_run(self, run: str, starts_line: bool) -> None:
        """Backticks or tildes."""
        if self._region:
            ends = starts_line and run[0] == self._region[0] and len(run) >= len(self._region)
            self._fence = run if ends else ""
            return
        self._fence = run if starts_line and len(run) >= 3 else ""
        if run[0] == "`" and not self._inline:
            self._inline = len(run)
        elif run[0] == "`" and self._inline == len(run):
            self._leave()

    def _end_line(self) -> None:
        if self.is_inline:
            self.found = self.waiting
            return
        self._inline, self._is_line_start = 0, True
        if self._fence and self._region:
            self._leave()
        elif self._fence:
            self._region = self._fence
        self._fence = ""

    def _leave(self) -> None:
        """Code has ended."""
        self.passed, self.waiting = self.passed or self.waiting, None
        self._region, self._inline = "", 0


def tag_prefix(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that starts ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
