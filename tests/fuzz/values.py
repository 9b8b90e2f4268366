"""Strategies that several tests share: wrong values for a key, and changes of a JSON document at any place."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

NAMES = st.text(st.characters(exclude_categories=[]), max_size=6)
SIZES = st.sampled_from(
    [0, 1, -1, 2, 7, 64, 1023, 2**15, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32, 2**63, 10**90, 10**400]
)
NUMBERS = SIZES | st.integers(-3, 5000) | st.floats() | st.sampled_from([0.0, -0.5, 1e-300, 1e30, 1e38, 1e308])
TEXTS = NAMES | st.sampled_from(["", "x" * 5000, "\0", "../x", "/dev/zero", "6", "NaN", "\ud800", "\x1b[31m", "affine"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=5)


def places(document: Any) -> list[tuple[Any, ...]]:
    """Every place of a document, as keys and list positions from the top; of long lists and objects the first ones."""
    found: list[tuple[Any, ...]] = []
    left: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    while left:
        path, value = left.pop()
        items = (
            list(value.items())
            if isinstance(value, dict)
            else list(enumerate(value))
            if isinstance(value, list)
            else []
        )
        for key, inner in items[:40]:
            found.append((*path, key))
            left.append(((*path, key), inner))
    return sorted(found, key=repr)


def changes(document: Any, values: st.SearchStrategy[Any] = VALUES, most: int = 3) -> st.SearchStrategy[list[Any]]:
    """A few changes: a value put, taken away, or copied from elsewhere."""
    known = places(document)
    put = st.tuples(st.just("put"), st.sampled_from(known), values)
    drop = st.tuples(st.just("drop"), st.sampled_from(known), st.none())
    move = st.tuples(st.just("copy"), st.sampled_from(known), st.sampled_from(known))
    add = st.tuples(st.just("add"), st.sampled_from(known), st.tuples(NAMES, values))
    return st.lists(put | put | drop | move | add, min_size=1, max_size=most)


def changed(document: Any, made: list[Any]) -> Any:
    """The document after the changes that still have a place."""
    document = copy.deepcopy(document)
    for kind, path, value in made:
        try:
            holder = _at(document, path[:-1])
            if kind == "put":
                holder[path[-1]] = value
            elif kind == "drop":
                del holder[path[-1]]
            elif kind == "copy":
                holder[path[-1]] = copy.deepcopy(_at(document, value))
            else:
                holder[path[-1]][value[0]] = value[1]
        except (LookupError, TypeError):
            continue
    return document


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document
