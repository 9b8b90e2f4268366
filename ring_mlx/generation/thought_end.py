"""Finds the tag that ends a thought in text that comes in pieces.

A ``</think>`` ends the thought unless it stands in code. What code is follows Markdown, read line by line:

- Inline code is between two runs of as many backticks on one line. After a single run the tag waits for the end of its
  line: another run of that length makes it code, the end of the line makes it the end of the thought.
- A fenced block is between lines that begin with three or more backticks or tildes, in a quote or a list too. A tag in
  it is passed over. One on a line of its own that no ``<think>`` precedes in the block is suspect while a block is left
  open: the thought may never have closed its block.
- A string in the JSON of a ``<tool_call>`` counts as code as well.

What is found depends on the text alone, not on how it was cut.
"""

from __future__ import annotations

import re
from typing import NamedTuple

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
CALL = rf"{CALL_START}[ \t\r\n]*"
CALL = rf"{CALL_START}[ \t\r\n]*"
MARKS = re.compile(rf"`+|~~~+|{THINK_START}|{THINK_END}|{CALL}[\[{{]|\n")
GROWING = re.compile(rf"(?:`+|~+|{CALL})\Z")
CALL_MARKS = re.compile(rf'\\.|"|{THINK_END}|{CALL_END}', re.DOTALL)
PREFIXES = " \t\r>*+-"  # of a line in a quote or a list


class Place(NamedTuple):
    """Where a tag begins in the text, and the number of pieces before it."""

    at: int
    pieces: int


class ThoughtEnd:
    """Reads a thought up to its end."""

    def __init__(self) -> None:
        self.found: Place | None = None
        self.waiting: Place | None = None  # the first tag in code that is still open
        self.passed: Place | None = None  # the first tag in code that has ended
        self.suspect: Place | None = None
        self.is_plain = False  # the first tag is the end, in code or not
        self._rest, self._at = "", 0
        self._region, self._fence, self._inline = "", "", 0
        self._is_line_start, self._is_quoted, self._is_opened = True, False, False
        self._fences = 0

    @property
    def is_inline(self) -> bool:
        """Whether a tag waits for the end of its line."""
        return self.waiting is not None and not self._region

    @property
    def is_in_doubt(self) -> bool:
        """Whether the thought may have ended in what looks like code."""
        return self.waiting is not None or (self.suspect is not None and self._fences % 2 == 1)

    def look(self, text: str, pieces: int, last: bool = False) -> int:
        """Take the next text; returns the length that is certainly before the end of the thought."""
        self._rest += text
        at = 0
        growing = None if last else GROWING.search(self._rest)
        while self.found is None and (mark := self._next_mark(at)):
            if growing and mark.end() > growing.start() and self._region != CALL_START:
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
        """Let the next tag end the thought, also in code."""
        self._region, self._fence, self._inline = "", "", 0

    def in_code(self, is_certain: bool) -> Place | None:
        """The tag in code that has to do as the end of a text without another; code that has ended holds none unless
        ``is_certain``, since the text began with a thought.
        """
        if is_certain:
            return self.suspect or self.passed or self.waiting
        return (self.suspect if self.is_in_doubt else None) or self.waiting

    def _next_mark(self, at: int) -> re.Match[str] | None:
        return (CALL_MARKS if self._region == CALL_START else MARKS).search(self._rest, at)

    def _unsure(self, at: int) -> int:
        """Length of the end that may become a mark."""
        rest = self._rest[at:]
        if self._region == CALL_START:
            return max(rest.endswith("\\"), tag_prefix(rest, THINK_END), tag_prefix(rest, CALL_END))
        run = GROWING.search(rest)
        return max(len(run[0]) if run else 0, *(tag_prefix(rest, tag) for tag in (THINK_START, THINK_END, CALL_START)))

    def _pass(self, text: str) -> None:
        if text.strip(PREFIXES):
            self._is_line_start = False
        if self._region and text.strip():
            self._fence = ""

    def _take(self, mark: str, place: Place) -> None:
        if self.is_plain:
            self.found = place if mark == THINK_END else None
        elif mark == "\n":
            self._end_line()
        elif mark[0] in "`~":
            self._take_run(mark)
        elif mark == THINK_END:
            self._take_end(place)
        elif self._region == CALL_START:
            if mark == CALL_END and not self._is_quoted:
                self._leave()
            self._is_quoted ^= mark == '"'
        elif mark != THINK_START and not self._region and not self._inline:
            self._region, self._is_quoted = CALL_START, False
        else:
            self._is_opened |= mark == THINK_START
            self._pass(mark)
            if "\n" in mark:
                self._end_line()

    def _take_end(self, place: Place) -> None:
        if (not self._inline and not self._region) or (self._region == CALL_START and not self._is_quoted):
            self.found = place
        elif self._region and self._region != CALL_START and self._is_line_start and not self._is_opened:
            self.suspect = self.suspect or place
        self.waiting = self.waiting or place
        self._fence, self._is_line_start, self._is_opened = "", False, False

    def _take_run(self, run: str) -> None:
        may_fence, self._is_line_start = self._is_line_start and len(run) >= 3, False
        if self._region:
            ends = may_fence and run[0] == self._region[0] and len(run) >= len(self._region)
            self._fence = run if ends else ""
            self._fences += may_fence
            return
        self._fence = run if may_fence else ""
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
            self._region, self._is_opened = self._fence, False
            self._fences += 1
        self._fence = ""

    def _leave(self) -> None:
        self.passed, self.waiting = self.passed or self.waiting, None
        self._region, self._inline = "", 0


def tag_prefix(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that starts ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
