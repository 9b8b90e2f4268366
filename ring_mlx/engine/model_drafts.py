"""Drafts from a smaller model for one answer after the other, with snapshots of its cache as those of the model it drafts for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np

from ring_mlx.engine.snapshots import Live, SnapshotTree
from ring_mlx.generation.draft_model import DraftCache, DraftModel, LookupOrModel
from ring_mlx.generation.draft_sources import PromptDrafts
from ring_mlx.generation.drafts import Drafter
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model


class ModelDrafts:
    """Prompt lookup, or a smaller model that reads no prefix twice, as far as a budget of snapshots goes.

    Snapshots are taken where other prompts may go on, where a prompt ends and where an answer ends; so an edit, a branch or
    another conversation finds what the smaller model has read of it.

    Args:
        lookup: For the same answers.
        model: With the tokenizer of the model that it drafts for.
        step_tokens: Tokens that it reads at once.
        budget_bytes: Most bytes of its snapshots.
    """

    def __init__(self, lookup: PromptDrafts, model: Model, step_tokens: int | None, budget_bytes: int) -> None:
        self.pace, self.model, self.tree = lookup.pace, model, SnapshotTree(budget_bytes)
        self._lookup, self._step_tokens = lookup, step_tokens
        self._points: Mapping[int, str] = {}

    def drafter(self, tokens: Sequence[int]) -> Drafter:
        """A drafter after these tokens, from the deepest snapshot of them."""
        lookup = self._lookup.drafter(tokens)
        cache = _KeptCache(self.model, self.tree, tokens, self._points)
        return LookupOrModel(lookup, DraftModel(self.model, tokens, self._step_tokens, cache), self.pace)

    def take_back(self, drafter: Drafter) -> None:
        """Keep what the model has read of an answer that has ended."""
        if isinstance(drafter, LookupOrModel):
            self._lookup.take_back(drafter.lookup)
            drafter.end()

    def at(self, points: Mapping[int, str]) -> ModelDrafts:
        """The same for one prompt, with the places where others may go on."""
        one = copy.copy(self)
        one._points = points
        return one


class _KeptCache(DraftCache):
    """A cache that begins at a snapshot."""

    def __init__(self, model: Model, tree: SnapshotTree, tokens: Sequence[int], points: Mapping[int, str]) -> None:
        self._live, self._tree = Live(model.make_cache), tree
        self._live.restore(tree.deepest(tokens))
        self.read, self._points = len(self._live.tokens), dict(points) | {len(tokens): "prompt"}

    @property
    def cache(self) -> HybridCache:  # type: ignore[override]
        return self._live.cache

    def forget(self) -> None:
        """Begin with nothing read."""
        self._live.restore(None)
        self.read = 0

    def next_place(self, end: int) -> int:
        """The next place to keep, or ``end``."""
        return min([at for at in self._points if self.read < at < end], default=end)

    def keep(self, tokens: Sequence[int]) -> None:
        """Take a snapshot; one of the same tokens stays."""
        if self._tree.budget_bytes and len(tokens) > len(self._live.tokens):
            self._live.advance(np.asarray(tokens, dtype=np.int32))
            self._tree.add(self._live.snapshot(self._points.get(len(tokens), "generated"), durable=False))
            self._tree.settle(tokens)
