"""Counts the operations that a decode step sends to the device: primitives of its graph that launch something.

The graph is that of the library's own loop, taken where the loop launches it, choice of the token included. What MLX
compiled into one kernel is one primitive. A view that turns out to need a copy is not seen, nor is a primitive that
takes several launches, so this is a count of operations rather than of launches.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from ring_mlx.bench.engines import Engine

_SHAPES = {"ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Split", "Squeeze", "Transpose", "Unflatten", "View"}
VIEWS = _SHAPES | {"AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "Slice", "StopGradient"}
_NODE = re.compile(r'^\{ \d+ \[label ="([^"]*)"', re.MULTILINE)
CONTEXT = 16


def count_primitives(*outputs: Any) -> Counter[str]:
    """Primitives by name that computing the arrays launches, without views and computed arrays."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *_arrays(outputs))
    return Counter(name for name in _NODE.findall(dot.getvalue()) if name not in VIEWS)


@contextmanager
def count_launches(cache: Sequence[Any] = ()) -> Iterator[list[Counter[str]]]:
    """Lists the primitives of each graph that a loop launches meanwhile, by ``mx.async_eval``, the caches' state included."""
    counts: list[Counter[str]] = []
    launch = mx.async_eval

    def count(*arrays: Any) -> None:
        counts.append(count_primitives(arrays, [c.state for c in cache]))
        launch(*arrays)

    with patch.object(mx, "async_eval", count):
        yield counts


def count_decode_step(engine: Engine, vocabulary: int) -> Counter[str]:
    """Primitives of one decode step of one row, from the token to the next one and the caches' new contents."""
    cache = engine.make_cache()
    prompt = mx.arange(CONTEXT, dtype=mx.int32)[None] % vocabulary
    with count_launches(cache) as counts:
        for n, _ in enumerate(engine.tokens(prompt, cache, 4, CONTEXT)):
            if n == 2:
                break
    return counts[-1]


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [a for part in parts for a in _arrays(part)]
