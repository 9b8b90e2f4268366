"""Fuzzy matching of what is typed with names: best first, hits marked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeVar

from textual.content import Content
from textual.fuzzy import FuzzySearch

from ring_mlx import harmless

HIT = "bold underline"
MOST_WAYS = 50  # to place the letters, of which Textual tries all
MOST_LETTERS = 1000  # of a name
Item = TypeVar("Item")


class BoundedSearch(FuzzySearch):
    """Textual's search, but with one way to place the letters where there are many: "abab" in "aabbaabb..." has millions."""

    def _match(self, query: str, candidate: str) -> Iterable[tuple[float, Sequence[int]]]:
        if not (at := _shortest(query, candidate)):
            return
        if query in candidate or prod(map(candidate.count, query)) <= MOST_WAYS:
            yield from super()._match(query, candidate)
        else:
            yield self.score(candidate, at), at


_search = BoundedSearch(case_sensitive=True)


def match(query: str, text: str) -> tuple[float, set[int]]:
    """How well a text has the letters of each word of the query in order, and where; 0 if it lacks one."""
    total, at, low = 0.0, set[int](), _lowered(text)
    for word in query.split():
        score, found = _search.match(_lowered(word), low)
        if not score:
            return 0.0, set()
        total, at = total + score, at | set(found)
    return total, at


def best(
    query: str, items: Iterable[Item], text_of: Callable[[Item], str], most: int | None = None
) -> list[tuple[Item, Content]]:
    """The items that match, at most so many, the best first, with their names as they are shown; all without a query."""
    found = []
    for item in items:
        shown = harmless(text_of(item)[:MOST_LETTERS], is_name=True)
        found.append((item, shown, *match(query, shown)))
    if query.strip():
        found = sorted((f for f in found if f[2]), key=lambda f: -f[2])
    return [(item, marked(shown, at)) for item, shown, _, at in found[:most]]


def marked(text: str, at: Iterable[int]) -> Content:
    """The text with the letters at these places marked."""
    content = Content(text)
    for place in sorted(at):
        content = content.stylize(HIT, place, place + 1)
    return content


def _lowered(text: str) -> str:
    """The text in lower case, letter by letter, so that places stay: that of İ alone would be two."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c if len(c.lower()) > 1 else c.lower() for c in text)


def _shortest(query: str, text: str) -> list[int]:
    """Where the letters are that end first, as close together as they can be; empty if one is missing."""
    end = -1
    for letter in query:
        if (end := text.find(letter, end + 1)) < 0:
            return []
    end += 1
    return [end := text.rfind(letter, 0, end) for letter in reversed(query)][::-1]
