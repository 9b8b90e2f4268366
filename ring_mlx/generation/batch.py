"""Several sequences in one step, each of its own length and age."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from metal_kernels import launch
from ring_mlx.checkpoint.vocabulary import whole_ids
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.batch_row import Row
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.decoding import (
    LogitsProcessor,
    Picked,
    Picker,
    Sampler,
    prefill,
    prefill_step_or_default,
)
from ring_mlx.generation.draft_sources import MOST_ROWS, DraftSource
from ring_mlx.generation.drafts import Counts
from ring_mlx.generation.speculation import Speculation
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.model.model import Model
from ring_mlx.model.ragged_cache import RaggedKVCache


class Batch:
    """Decodes many sequences at once; they join and leave between any two steps.

    A joining prompt is read alone, one prefill step a call of `step`, so that the others go on meanwhile. A lone row
    keeps its own cache, so that it runs as `decode` runs it. With a second one caches are merged: keys and values are
    padded on the left to the longest row and masked there; linear states have no length and need no padding. The last
    row that stays gets a cache of its own again. Each row's tokens are those that it would have alone. Up to `MOST_ROWS` rows,
    of which one has drafts, may read several tokens at once; between their tokens caches are ahead.

    Args:
        prefill_step_size: Prompt tokens that one `step` may read, by default `prefill_step_or_default`.
        most_rows: Sequences at once, None for any number. Only a batch of one takes quantized keys and values.
        kv_quantization: For the softmax layers of a batch of one, or None.
    """

    def __init__(
        self,
        model: Model,
        prefill_step_size: int | None = None,
        most_rows: int | None = None,
        kv_quantization: KVQuantization | None = None,
    ) -> None:
        prefill_step_size = prefill_step_or_default(prefill_step_size)
        if prefill_step_size < 1:
            raise OptionError(f"prefill step size {prefill_step_size} is not positive; give 1 or more.")
        self._model, self._step_size = model, prefill_step_size
        self._most_rows, self._kv_quantization = most_rows, kv_quantization
        self._joining: deque[Row] = deque()
        self._rows: list[Row] = []
        self._merged: HybridCache | None = None
        self._speculation: Speculation | None = None
        self._count = 0

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, padding included."""
        caches = [r.cache for r in (*self._joining, *self._rows)]
        return sum(c.nbytes for c in (*caches, self._merged) if c is not None)

    def add(
        self,
        prompt: Sequence[int],
        *,
        cache: HybridCache | None = None,
        logits: mx.array | None = None,
        history: Sequence[int] | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        next_forced: Callable[[], int | None] | None = None,
        constraint: Constraint | None = None,
        picker: Picker | None = None,
        max_tokens: int | None = None,
        drafts: DraftSource | None = None,
    ) -> int:
        """Let a sequence join. The caller must watch its length and remove it at the end of the context.

        Args:
            prompt: Ids that continue the cache: at least one, or none where there are logits.
            cache: Of one sequence, which becomes the batch's own; None is an empty one.
            logits: Of the first token [1, vocab] float32, where the whole prompt has been read.
            history: All ids before the first token, for the processors; by default the prompt.
            sampler, logits_processors, next_forced, constraint: As for `ring_mlx.generation.decoding.decode`.
            picker: Of a row that was removed and goes on, in place of these four.
            max_tokens: The last of so many tokens is not fed to the model while the row is alone.
            drafts: Used while there are few rows; the cache must not be quantized.

        Returns:
            The sequence's number.

        Raises:
            PromptError: If the prompt is empty, exceeds the context, or has an id outside the vocabulary.
            OptionError: If the batch is full, or keys and values are quantized, which cannot be padded.
        """
        cache = self._model.make_cache() if cache is None else cache
        context = self._model.config.context_tokens
        if not prompt and logits is None:
            raise PromptError("the prompt is empty; give some text.")
        if len(prompt) + int(cache.offset) > context:
            raise PromptError(f"{len(prompt) + int(cache.offset)} tokens exceed the context of {context}; shorten it.")
        if self._most_rows != 1 and any(isinstance(c, QuantizedKVCache) for c in cache):
            raise OptionError("quantized keys and values cannot join a batch; leave --kv-bits out.")
        if self._most_rows is not None and len(self) >= self._most_rows:
            raise OptionError(f"the batch has {self._most_rows} sequences already; remove one.")
        ids = whole_ids(prompt, self._model.config.vocab_size)
        self._count += 1
        text = list(ids if history is None else history)
        seen = mx.array(text if logits_processors else [], dtype=mx.int32)
        picker = picker or Picker(sampler, logits_processors, seen, next_forced, constraint)
        row = Row(picker, number=self._count, cache=cache, unread=list(ids), logits=logits, drafts=drafts)
        row.left = sys.maxsize if max_tokens is None else max_tokens
        row.text = text if drafts else []
        if ids:
            self._joining.append(row)
        else:
            self._join(row)
        return self._count

    @launch.doubting()
    def step(self) -> dict[int, int]:
        """Read a step of the next joining prompt, then give every joined row its next token.

        Returns the token of each row, by number. Rows whose prompt is not yet read have none, nor has a row that waits for
        another, in which more drafted tokens come true.
        """
        if self._joining:
            self._read(self._joining[0])
        if not self._rows:
            return {}
        if len(self._rows) <= MOST_ROWS and any(row.drafts is not None for row in self._rows):
            return self._speculate()
        chosen = self._choose_all()
        self._forward(chosen)
        mx.async_eval([row.logits for row in self._rows if row.logits is not None])
        tokens = np.asarray(chosen).tolist()
        for row, token in zip(self._rows, tokens, strict=True):
            row.came(token)
        return {row.number: token for row, token in zip(self._rows, tokens, strict=True)}

    def check(self, number: int) -> None:
        """Raises ModelError if the logits of the row's last token are not finite; other rows may be good."""
        self._given(number).ids()

    def logprobs(self, number: int) -> mx.array:
        """The log-probabilities [vocab] of the row's last token, computed only when used."""
        return self._given(number).logprobs[0]

    def picker(self, number: int) -> Picker:
        """What chooses a row's tokens; with it a row that is removed can go on later, as `add` says."""
        return self._row(number).picker

    def counts(self, number: int) -> Counts:
        """What was drafted for a row."""
        return self._row(number).counts

    def not_timed(self) -> None:
        """Let the present step not count as one of its length: other work ran meanwhile."""
        if self._speculation is not None:
            self._speculation.is_timed = False

    def remove(self, number: int) -> HybridCache:
        """Let a sequence leave.

        Returns its cache, as if it had been alone; it has seen every token that `step` gave, but for the last of
        ``max_tokens``. Raises OptionError if there is no such sequence.
        """
        row = self._row(number)
        row.leave()
        if row in self._joining:
            self._joining.remove(row)
        else:
            self._settle()
            at = self._rows.index(row)
            del self._rows[at]
            mx.eval([r.logits for r in (row, *self._rows) if r.logits is not None])
            self._part(row, at)
        assert row.cache is not None
        return row.cache

    def _row(self, number: int) -> Row:
        row = next((row for row in (*self._joining, *self._rows) if row.number == number), None)
        if row is None:
            raise OptionError(f"no sequence {number} in the batch; remove each once.")
        return row

    def _given(self, number: int) -> Picked:
        given = self._row(number).picker.given
        assert given is not None
        return given

    def _part(self, row: Row, at: int) -> None:
        """Separate a merged row's cache from those of the others."""
        if self._merged is None:
            return
        row.cache = HybridCache(c.extract(at) for c in self._merged)
        keep = [n for n in range(len(self._rows) + 1) if n != at]
        if len(keep) == 1:
            self._rows[0].cache, self._merged = HybridCache(c.extract(keep[0]) for c in self._merged), None
            return
        for c in self._merged:
            c.filter(mx.array(keep))

    def _read(self, row: Row) -> None:
        part, row.unread = row.unread[: self._step_size], row.unread[self._step_size :]
        steps = prefill(mx.array(part, dtype=mx.int32), self._model, row.cache, [len(part)], self._kv_quantization)
        for _, logits in steps:
            row.logits = logits
        if not row.unread:
            self._joining.popleft()
            self._join(row)

    def _join(self, row: Row) -> None:
        self._settle()
        if self._rows and self._merged is None:
            self._merged, self._rows[0].cache = _merged(self._rows[0].cache), None
        if self._merged is not None:
            for mine, new in zip(self._merged, _merged(row.cache), strict=True):
                mine.extend(new)
            row.cache = None
        self._rows.append(row)

    def _forward(self, chosen: mx.array) -> None:
        """Feed each row's token [rows], but not the last token of a single row."""
        cache = self._cache
        if self._merged is None and self._rows[0].left == 0:
            self._rows[0].logits = None
            return
        logits = self._model(chosen[:, None], cache, last_only=True)[:, -1]
        if self._kv_quantization is not None:
            kv = self._kv_quantization
            maybe_quantize_kv_cache(cache, kv.start, kv.group_size, kv.bits)
        for n, row in enumerate(self._rows):
            row.logits = logits if len(self._rows) == 1 else logits[n : n + 1]

    def _speculate(self) -> dict[int, int]:
        """The next token of each row that has one by now, of which several may be read at once."""
        if self._speculation is None:
            for row in self._rows:
                row.begin_drafting()
            pace = next(row.drafts.pace for row in self._rows if row.drafts is not None)
            self._speculation = Speculation(self._model, self._cache, self._rows, pace.of(len(self._rows)))
        return {self._rows[n].number: token for n, token in next(self._speculation).items()}

    def _settle(self) -> None:
        """Let caches have what was given, neither more nor less."""
        if self._speculation is not None:
            self._speculation.close()
            self._speculation = None

    @property
    def _cache(self) -> HybridCache | None:
        return self._rows[0].cache if self._merged is None else self._merged

    def _choose_all(self) -> mx.array:
        """The next token of each row, [rows]."""
        chosen = [row.choose() for row in self._rows]
        if len(chosen) == 1:
            return chosen[0]
        together = mx.concatenate(chosen)
        mx.async_eval(together)  # by itself: what is awaited of one call is all that it computes
        return together


def _merged(cache: Any) -> HybridCache:
    return HybridCache((RaggedKVCache if isinstance(c, KVCache) else type(c)).merge([c]) for c in cache)
