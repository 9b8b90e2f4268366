"""Whether the caches of requests fit into memory, by what they are likely to need.

An answer without a limit may fill the context. To keep that much for each would let few run at once, though most are short:
so a request is let in by its likely length, and where answers grow beyond, the last one that came waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx

from ring_mlx.engine.row import Row
from ring_mlx.model import memory
from ring_mlx.model.config import RingConfig

LIKELY_TOKENS = 2048  # of an answer, its thought included
GROW_TOKENS = 512  # beyond what an answer has
LOOK_EVERY_STEPS = 32


def likely(prompt_tokens: int, limit: int, done: int = 0) -> int:
    """The tokens that a request will have, prompt included."""
    return prompt_tokens + min(limit, max(LIKELY_TOKENS, done + GROW_TOKENS))


def soon(row: Row) -> int:
    """The tokens that a row will have before the next look."""
    return len(row.prompt.ids) + min(row.limit, len(row.tokens) + GROW_TOKENS)


def fit(
    config: RingConfig,
    held_bytes: int,
    reading: Iterable[Row],
    lengths: Sequence[int],
    draft: RingConfig | None = None,
) -> bool:
    """Whether sequences of these lengths fit, each of which takes as much as the longest.

    ``held_bytes`` are those of the batch's caches; with those of prompts that are being read they are a part of it.
    """
    held = held_bytes + sum(row.reader.live.cache.nbytes for row in reading)
    models = [config] if draft is None else [config, draft]
    needed = len(lengths) * sum(memory.cache_bytes(c, max(lengths)) for c in models)
    return mx.get_active_memory() - held + needed <= memory.budget_bytes()
