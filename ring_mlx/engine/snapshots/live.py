"""The one sequence that grows: the model's cache, the tokens in it, and what it shares with snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache

from ring_mlx.engine.snapshots import blocks
from ring_mlx.engine.snapshots.blocks import Block, Form, Snapshot, Tokens
from ring_mlx.engine.snapshots.tree import common_prefix
from ring_mlx.engine.stored.manifest import BLOCK_TOKENS

if TYPE_CHECKING:
    from ring_mlx.model.cache import HybridCache


class Live:
    """A cache that can go back to any snapshot.

    The cache is made of mlx-lm's own layer caches, so the model and every mlx-lm tool take it. Going back to a
    snapshot whose tokens the buffer still holds moves offsets and copies nothing; what the buffer lacks is copied
    from the snapshot's blocks.
    """

    def __init__(self, make_cache: Callable[[], HybridCache]) -> None:
        self._make_cache = make_cache
        self.cache = make_cache()
        self.tokens: Tokens = np.zeros(0, dtype=np.int32)
        self._blocks: list[Block] = []
        self._form: Form = blocks.form_of(self.cache)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Set the cache to the state of a snapshot; None empties it."""
        if snapshot is None or snapshot.offset == 0:
            self.cache, self._blocks = self._make_cache(), []
            self.tokens, self._form = np.zeros(0, dtype=np.int32), blocks.form_of(self.cache)
            return
        if snapshot.form != blocks.form_of(self.cache):
            self.cache, self.tokens = of_form(self._make_cache(), snapshot.form), self.tokens[:0]
        keep = common_prefix(self.tokens, snapshot.tokens)
        blocks.paste(self.cache, keep, snapshot.parts, snapshot.offset)
        for layer, state in zip(blocks.linear_layers(self.cache), snapshot.states, strict=True):
            layer[0] = state
        self.tokens, self._blocks, self._form = snapshot.tokens, list(snapshot.blocks), snapshot.form

    def advance(self, tokens: Tokens) -> None:
        """Note that the model has been run over these tokens, which continue those held."""
        self.tokens = tokens

    def snapshot(self, kind: str, logits: mx.array | None = None, durable: bool = True) -> Snapshot:
        """Take a snapshot of the cache; arguments are fields of `Snapshot`."""
        if self._form != blocks.form_of(self.cache):
            self._blocks, self._form = [], blocks.form_of(self.cache)
        end = len(self.tokens)
        while (start := BLOCK_TOKENS * len(self._blocks)) + BLOCK_TOKENS <= end:
            self._blocks.append(blocks.cut(self.cache, self.tokens, start, start + BLOCK_TOKENS))
        tail = blocks.cut(self.cache, self.tokens, start, end) if start < end else None
        states = [layer[0] for layer in blocks.linear_layers(self.cache)]
        taken = Snapshot(self.tokens, states, list(self._blocks), tail, self._form, logits, kind, durable)
        mx.eval([b.arrays for b in taken.parts], [s for s in states if s is not None], [] if logits is None else logits)
        return taken


def of_form(cache: HybridCache, form: Form) -> HybridCache:
    """An empty cache with its softmax layers quantized as the form says."""
    wanted = iter(form)
    softmax = set(map(id, blocks.softmax_layers(cache)))
    made: list[Any] = []
    for c in cache:
        quantized = next(wanted) if id(c) in softmax else None
        made.append(QuantizedKVCache(quantized[1], quantized[0]) if quantized else c)
    return type(cache)(made)
