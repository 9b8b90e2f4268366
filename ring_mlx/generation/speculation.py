"""Speculative decoding: tokens drafted from the text are read in one step; those that the model chooses too are kept.

The model chooses every token, with its own sampler and processors, from logits after the tokens before it. A draft only says
which tokens are read together, so the text has the same distribution as without; with a seed or greedily it is the same
text, as far as a step of several tokens computes the same logits as steps of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from metal_kernels import launch
from ring_mlx.generation.decoding import CLEAR_EVERY_TOKENS, Forward, LogitsProcessor, Picker, Sampler, forward
from ring_mlx.generation.drafts import Draft, Drafter, Pace
from ring_mlx.generation.sampling import SeededSampler
from ring_mlx.model.tentative import Tentative


def speculate(
    logits: mx.array,
    model: Forward,
    cache: Any,
    history: Sequence[int],
    drafter: Drafter,
    pace: Pace,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    next_forced: Callable[[], int | None] | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yield the tokens of one row as `decode` does, several a step where ``pace`` says so.

    Between the tokens of one step the cache is ahead. At its end, and when the generator is closed or fails, the cache has
    what `decode` would have left: the tokens that were yielded, but for the last of ``max_tokens``.

    Args:
        logits: Of the first token, [1, vocab].
        cache: Of a single row, not quantized.
        history: The ids read so far, for the processors.
        drafter: Says which tokens may come next; it was given the history.
        pace: Says how many tokens to draft, and counts them; it may be kept from answer to answer.
    """
    picker = Picker(sampler, logits_processors, mx.array(list(history), dtype=mx.int32))
    answer = _Answer(model, cache, drafter, pace, picker)
    forced = next_forced or (lambda: None)
    with launch.doubting():
        answer.begin(logits)
        left, read = max_tokens, 0
        while left:
            began, given, read_before = time.perf_counter(), answer.given, read
            answer.ask(forced)
            wanted = min(answer.wanted(), left - 2)
            if wanted < 1:
                yield from answer.one(is_last=left == 1)
            else:
                yield from answer.several(wanted, forced)
            read = answer.read
            if read > 1 or read_before == 1:  # a single token is computed while the step after it runs
                pace.took(read, time.perf_counter() - began - answer.waited)
            given = answer.given - given
            left -= given
            if answer.given // CLEAR_EVERY_TOKENS != (answer.given - given) // CLEAR_EVERY_TOKENS:
                mx.clear_cache()


class _Answer:
    """The text so far: its tokens, the cache that has read them, and the token that is picked but not read.

    ``given`` counts the tokens that were yielded. Of the last step, ``read`` has the number of its tokens and ``waited`` the
    seconds that do not count: for the step before, and outside after others than its first token.
    """

    def __init__(self, model: Forward, cache: Any, drafter: Drafter, pace: Pace, picker: Picker) -> None:
        self._model, self._cache, self._drafter, self._pace, self._picker = model, cache, drafter, pace, picker
        self._guess_one: Callable[[], Draft] = getattr(drafter, "guess", None) or partial(drafter.draft, 1)
        self._is_asked = self._is_compared = False
        self.given, self.read, self.waited = 0, 0, 0.0

    def begin(self, logits: mx.array) -> None:
        """Pick the first token."""
        self._picked = self._picker.pick(logits)

    def ask(self, forced: Callable[[], int | None]) -> None:
        """Let the picked token be another one, asking once for each."""
        if not self._is_asked:
            self._picked = self._picked.replaced(forced())
        self._is_asked = True

    def wanted(self) -> int:
        """How many tokens to draft after the picked one, which need not be known yet."""
        self._guess = self._guess_one()
        return self._pace.wanted(self._guess.length) if self._guess.length else 0

    def one(self, is_last: bool) -> Iterator[tuple[int, mx.array]]:
        """Read the picked token and pick the next, which are computed while this one is handled."""
        picked = following = self._picked
        if not is_last:
            self._picker.add(picked.y)
            following = self._picker.pick(forward(picked.y[:, None], self._model, self._cache)[:, 0])
        (token,) = picked.ids()
        self._came(token, self._guess, 0)
        self.given, self.read, self.waited = self.given + 1, 1, 0.0
        self._pace.count(1, 1)
        yield token, picked.logprobs[0]
        self._picked, self._is_asked = following, False

    def several(self, wanted: int, forced: Callable[[], int | None]) -> Iterator[tuple[int, mx.array]]:
        """Read the picked token and some that may follow; yield those that do, and pick the next."""
        left, given = time.perf_counter(), 0
        (token,) = self._picked.ids()
        self.waited = time.perf_counter() - left
        self._came(token, self._guess, 0)
        left = time.perf_counter()
        draft = self._drafter.draft(wanted)
        self.waited += time.perf_counter() - left  # which is counted by itself
        tokens = [token, *draft.tokens]
        self.read = len(tokens)
        seeded = self._picker.sampler if isinstance(self._picker.sampler, SeededSampler) else None
        drawn = seeded.drawn if seeded else 0
        tentative = Tentative(self._model, self._cache, tokens)
        try:
            picks = self._picker.pick_each(tentative.logits, tokens)
            for at, token in enumerate(tokens):
                if at:
                    self.ask(forced)
                    (chosen,) = self._picked.ids()
                    if chosen != token:
                        self._pace.compared(draft.length, False)
                        self._is_compared = True
                        break
                    self._came(token, draft, at - 1)
                given += 1
                left = time.perf_counter()
                yield token, self._picked.logprobs[0]
                self.waited += time.perf_counter() - left if at else 0.0
                self._picked, self._is_asked = picks[at], False
        finally:
            tentative.keep(given)
            self.given += given
            self._pace.count(len(tokens), given)
            self._picker.add(mx.array(tokens[:given], dtype=mx.int32))
            if seeded:
                seeded.drawn = drawn + given

    def _came(self, token: int, draft: Draft, at: int) -> None:
        """Take a token in whose place there was a draft's; the one that ended a step was compared there."""
        if draft.tokens and not self._is_compared:
            self._pace.compared(draft.length, token == draft.tokens[at])
        self._is_compared = False
        self._drafter.add(token)
