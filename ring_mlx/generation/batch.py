"""Several sequences in one step, each of its own length and age."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.sample_utils import greedy_sampler

from metal_kernels import launch
from ring_mlx.checkpoint.vocabulary import whole_ids
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.decoding import (
    LogitsProcessor,
    Sampler,
    check_finite,
    largest_logit,
    prefill,
    prefill_step_or_default,
)
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model


@dataclass
class _Row:
    """One sequence: what it has said, how it chooses, and until it joins its own cache and what is left to read."""

    number: int
    tokens: list[int]
    sampler: Sampler
    processors: Sequence[LogitsProcessor]
    unread: list[int] = field(default_factory=list)
    cache: HybridCache | None = None


class Batch:
    """Decodes many sequences at once; they join and leave between any two steps.

    A joining prompt is read alone, one prefill step a call of `step`, so that the others go on meanwhile. Then its
    cache is merged: keys and values are padded on the left to the longest row and masked there; linear states have
    no length and need no padding. Each row's tokens are those that it would have alone.

    Args:
        model: The model.
        prefill_step_size: Prompt tokens that one `step` may read, by default `prefill_step_or_default`.
    """

    def __init__(self, model: Model, prefill_step_size: int | None = None) -> None:
        prefill_step_size = prefill_step_or_default(prefill_step_size)
        if prefill_step_size < 1:
            raise OptionError(f"prefill step size {prefill_step_size} is not positive; give 1 or more.")
        self._model, self._step_size = model, prefill_step_size
        self._joining: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._cache: HybridCache | None = None
        self._logits: mx.array | None = None
        self._largest: dict[int, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, padding included."""
        caches = [r.cache for r in self._joining if r.cache is not None]
        return sum(c.nbytes for c in caches) + (self._cache.nbytes if self._cache is not None else 0)

    def add(
        self,
        prompt: Sequence[int],
        *,
        cache: HybridCache | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> int:
        """Let a sequence join. Who adds one watches its length and removes it at the end of the context.

        Args:
            prompt: Ids, at least one, that continue the cache.
            cache: Of one sequence, which becomes the batch's own; None starts anew.
            sampler: As for `ring_mlx.generation.stream.generate_step`.
            logits_processors: As there; they see the prompt given here and what follows.

        Returns:
            The sequence's number.

        Raises:
            PromptError: If the prompt is empty, exceeds the context, or has an id outside the vocabulary.
            OptionError: If keys and values of the cache are quantised, which cannot be padded.
        """
        cache = self._model.make_cache() if cache is None else cache
        context = self._model.config.context_tokens
        if not prompt:
            raise PromptError("the prompt is empty; give some text.")
        if len(prompt) + int(cache.offset) > context:
            raise PromptError(f"{len(prompt) + int(cache.offset)} tokens exceed the context of {context}; shorten it.")
        if any(isinstance(c, QuantizedKVCache) for c in cache):
            raise OptionError("quantised keys and values cannot join a batch; leave --kv-bits out.")
        ids = whole_ids(prompt, self._model.config.vocab_size)
        self._count += 1
        self._joining.append(
            _Row(self._count, ids, sampler or greedy_sampler, logits_processors, unread=list(ids), cache=cache)
        )
        return self._count

    @launch.doubting()
    def step(self) -> dict[int, int]:
        """Read a step of the next joining prompt, then give every row that is in its next token.

        Returns:
            The token of each row, by number; rows whose prompt is not yet read have none.
        """
        if self._joining:
            self._read(self._joining[0])
        if not self._rows:
            return {}
        assert self._logits is not None
        largest, chosen = largest_logit(self._logits), self._choose_all()
        self._logits = self._model(chosen[:, None], self._cache, last_only=True)[:, -1].astype(mx.float32)
        mx.async_eval(self._logits, largest)
        tokens = np.asarray(chosen).tolist()
        self._largest = {row.number: value for row, value in zip(self._rows, np.asarray(largest).tolist(), strict=True)}
        for row, token in zip(self._rows, tokens, strict=True):
            row.tokens.append(token)
        return {row.number: token for row, token in zip(self._rows, tokens, strict=True)}

    def check(self, number: int) -> None:
        """Raises ModelError if the logits that the row's last token is from are not finite; other rows may be good."""
        check_finite([self._largest[number]])

    def remove(self, number: int) -> HybridCache:
        """Let a sequence leave.

        Returns:
            Its cache, as if it had been alone; it has seen every token that `step` gave.

        Raises:
            OptionError: If there is no such sequence.
        """
        for row in self._joining:
            if row.number == number and row.cache is not None:
                self._joining.remove(row)
                return row.cache
        at = next((n for n, row in enumerate(self._rows) if row.number == number), None)
        if at is None:
            raise OptionError(f"no sequence {number} in the batch; remove each once.")
        assert self._cache is not None
        assert self._logits is not None
        mx.eval(self._logits)
        alone = HybridCache(c.extract(at) for c in self._cache)
        del self._rows[at]
        keep = [n for n in range(len(self._rows) + 1) if n != at]
        if keep:
            for c in self._cache:
                c.filter(mx.array(keep))
            self._logits = self._logits[mx.array(keep)]
        else:
            self._cache = self._logits = None
        return alone

    def _read(self, row: _Row) -> None:
        part, row.unread = row.unread[: self._step_size], row.unread[self._step_size :]
        assert row.cache is not None
        for _, step_logits in prefill(mx.array(part, dtype=mx.int32), self._model, row.cache, [len(part)]):
            logits = step_logits
        if row.unread:
            return
        self._joining.popleft()
        joined = HybridCache(type(c).merge([c]) for c in row.cache)
        row.cache = None
        if self._cache is None or self._logits is None:
            self._cache, self._logits = joined, logits
        else:
            for mine, new in zip(self._cache, joined, strict=True):
                mine.extend(new)
            self._logits = mx.concatenate([self._logits, logits])
        self._rows.append(row)

    def _choose_all(self) -> mx.array:
        """The next token of each row, [rows]."""
        return mx.concatenate([self._choose(n, row) for n, row in enumerate(self._rows)])

    def _choose(self, n: int, row: _Row) -> mx.array:
        assert self._logits is not None
        logits = self._logits[n : n + 1]
        for process in row.processors:
            logits = process(mx.array(row.tokens, dtype=mx.int32), logits)
        return row.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
