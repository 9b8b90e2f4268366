"""Speculative decoding: tokens drafted from the text are read in one step; those that the model chooses too are kept.

The model chooses every token, with its own sampler and processors, from logits after the tokens before it. A draft only says
which tokens are read together, so the text has the same distribution as without; with a seed or greedily it is the same
text, as far as a step of several tokens computes the same logits as steps of one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from metal_kernels import launch
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.decoding import CLEAR_EVERY_TOKENS, Forward, LogitsProcessor, Picked, Picker, Sampler, forward
from ring_mlx.generation.drafts import Counts, Draft, Drafter, ForcedOr, Pace
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
    constraint: Constraint | None = None,
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
    picker = Picker(sampler, logits_processors, mx.array(list(history), dtype=mx.int32), next_forced, constraint)
    with launch.doubting():
        picker.picked = picker.pick(logits)
        yield from Speculation(model, cache, drafter, pace, picker, max_tokens)


class Speculation(Iterator[tuple[int, mx.array]]):
    """The rest of a row's tokens, as `speculate` yields them; once it is closed, others may go on from ``picker.picked``.

    Clear ``is_timed`` where other work ran since the last token. Of the last step, ``_read`` has the number of its tokens and
    ``_waited`` the seconds that do not count: for the step before, and outside after others than its first token.

    Args:
        picker: Has picked the first token.
        counts: Counts what is drafted.
    """

    def __init__(
        self,
        model: Forward,
        cache: Any,
        drafter: Drafter,
        pace: Pace,
        picker: Picker,
        max_tokens: int = sys.maxsize,
        counts: Counts | None = None,
    ) -> None:
        self._model, self._cache, self._drafter, self._pace, self._picker = model, cache, drafter, pace, picker
        if picker.constraint is not None:
            self._drafter = drafter = ForcedOr(drafter, picker.constraint)
        self._guess_one: Callable[[], Draft] = getattr(drafter, "guess", None) or partial(drafter.draft, 1)
        self._left, self._counts = max_tokens, counts or Counts()
        self._is_compared, self.is_timed = False, True
        self._read, self._waited, self._since_cleared = 0, 0.0, 0
        self._steps = self._all()

    def __next__(self) -> tuple[int, mx.array]:
        return next(self._steps)

    def close(self) -> None:
        """Leave in the cache what was given."""
        self._steps.close()

    def _all(self) -> Generator[tuple[int, mx.array]]:
        while self._left:
            began, left, read_before = time.perf_counter(), self._left, self._read
            self.is_timed = True
            self._picker.ask()
            wanted = min(self._wanted(), left - 2)
            yield from self._one() if wanted < 1 else self._several(wanted)
            is_known = self._pace.has_run(self._read)
            is_whole = self._read > 1 or read_before == 1  # a step of one token is computed while the next one runs
            if self.is_timed and is_known and is_whole:
                self._pace.took(self._read, time.perf_counter() - began - self._waited)
            self._since_cleared += left - self._left
            if self._since_cleared >= CLEAR_EVERY_TOKENS:
                self._since_cleared = 0
                mx.clear_cache()

    def _wanted(self) -> int:
        """How many tokens to draft after the picked one, which need not be known yet."""
        self._guess = self._guess_one()
        return self._pace.wanted(self._guess.length) if self._guess.length else 0

    def _one(self) -> Iterator[tuple[int, mx.array]]:
        """Read the picked token and pick the next, which are computed while this one is handled."""
        picked, following = self._picker.ask(), None
        if self._left > 1:
            self._picker.add(picked.y)
            following = self._picker.pick(forward(picked.y[:, None], self._model, self._cache)[:, 0])
        (token,) = picked.ids()
        self._came(token, self._guess, 0)
        self._read, self._waited = 1, 0.0
        self._pace.count(1, 1)
        self._give(following)
        yield token, picked.logprobs[0]

    def _several(self, wanted: int) -> Iterator[tuple[int, mx.array]]:
        """Read the picked token and some that may follow; yield those that do, and pick the next."""
        left, given = time.perf_counter(), 0
        (token,) = self._picker.ask().ids()
        self._waited = time.perf_counter() - left
        self._came(token, self._guess, 0)
        left = time.perf_counter()
        draft = self._drafter.draft(wanted)
        self._waited += time.perf_counter() - left  # which is counted by itself
        tokens = [token, *draft.tokens]
        self._read = len(tokens)
        tentative = Tentative(self._model, self._cache, tokens)
        self._counts.drafted += len(draft.tokens)
        try:
            following = self._picker.pick_each(tentative.logits, tokens)
            for at, token in enumerate(tokens):
                if at:
                    (chosen,) = self._picker.ask().ids()
                    if chosen != token:
                        self._pace.compared(draft.length, False, at - 1)
                        self._is_compared = True
                        break
                    self._came(token, draft, at - 1)
                    self._counts.accepted += 1
                found = self._give(next(following))
                given += 1
                left = time.perf_counter()
                yield token, found.logprobs[0]
                self._waited += time.perf_counter() - left if at else 0.0
        finally:
            tentative.keep(given)
            self._pace.count(len(tokens), given)
            self._picker.add(mx.array(tokens[:given], dtype=mx.int32))

    def _came(self, token: int, draft: Draft, at: int) -> None:
        """Take a token in whose place there was a draft's; the one that ended a step was compared there."""
        if draft.tokens and not self._is_compared:
            self._pace.compared(draft.length, token == draft.tokens[at], at)
        self._is_compared = False
        self._drafter.add(token)

    def _give(self, following: Picked | None) -> Picked:
        self._left -= 1
        return self._picker.give(following)
