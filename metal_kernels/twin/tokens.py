"""Tokens of Metal source text."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(
    r"""
    (?P<space>(?:\s|\\\n)+)
  | (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<string>R"\((?:.*?)\)"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<number>(?:0[xX][0-9a-fA-F']+|(?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[A-Za-z]*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<op>::|->|.)
    """,
    re.DOTALL | re.VERBOSE,
)
NEWLINE = re.compile(r"\\\n|\n")


class RewriteError(Exception):
    """Source that the rewriter cannot read; the message starts with file and line."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its text, and its kind as named in `TOKEN`."""

    text: str
    kind: str

    @property
    def is_code(self) -> bool:
        """Whether the token is neither space nor comment nor emptied."""
        return self.kind not in ("space", "comment") and self.text != ""


def tokenize(source: str) -> list[Token]:
    """Every character of the source, in tokens."""
    return [Token(found.group(), str(found.lastgroup)) for found in TOKEN.finditer(source)]


class TokenList:
    """A source text as tokens that can be walked and replaced without moving a line."""

    def __init__(self, source: str, file: str) -> None:
        self.tokens = tokenize(source)
        self.file = file

    def __len__(self) -> int:
        return len(self.tokens)

    def __str__(self) -> str:
        return "".join(t.text for t in self.tokens)

    def text(self, i: int) -> str:
        """Text of token ``i``; empty outside the list."""
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def kind(self, i: int) -> str:
        """Kind of token ``i``; empty outside the list."""
        return self.tokens[i].kind if 0 <= i < len(self.tokens) else ""

    def is_code(self, i: int) -> bool:
        """Whether token ``i`` is neither space nor comment."""
        return self.tokens[i].is_code

    def after(self, i: int) -> int:
        """The next code token after ``i``, or the length of the list."""
        i += 1
        while i < len(self.tokens) and not self.tokens[i].is_code:
            i += 1
        return i

    def before(self, i: int) -> int:
        """The code token before ``i``, or -1."""
        i -= 1
        while i >= 0 and not self.tokens[i].is_code:
            i -= 1
        return i

    def closing(self, i: int, opened: str, closed: str) -> int:
        """The token that closes the bracket at ``i``."""
        depth = 0
        start = i
        while i < len(self.tokens):
            if self.tokens[i].is_code:
                if self.tokens[i].text == opened:
                    depth += 1
                elif self.tokens[i].text == closed:
                    depth -= 1
                    if depth == 0:
                        return i
            i += 1
        raise RewriteError(f"{self.file}:{self.line(start)}: '{opened}' is never closed")

    def line(self, i: int) -> int:
        return sum(t.text.count("\n") for t in self.tokens[:i]) + 1

    def blank(self, first: int, last: int) -> None:
        """Remove tokens first..last; only their line breaks stay."""
        for i in range(first, last + 1):
            breaks = "".join(NEWLINE.findall(self.tokens[i].text))
            self.tokens[i] = Token(breaks or ("" if i > first else " "), "space")

    def replace(self, i: int, text: str, kind: str = "name") -> None:
        """Put ``text`` in the place of token ``i``."""
        self.tokens[i] = Token(text, kind)
