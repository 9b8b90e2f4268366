"""Speculative decoding: tokens drafted from the text are read in one step; those that the model chooses too are kept.

The model chooses every token, with its own sampler and processors, from logits after the tokens before it. A draft only says
which tokens are read together, so the text has the same distribution as without; with a seed or greedily it is the same
text, as far as a step of several tokens computes the same logits as steps of one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels import launch
from ring_mlx.generation.constraint import Constraint
from ring_mlx.generation.decoding import CLEAR_EVERY_TOKENS, Forward, LogitsProcessor, Picked, Picker, Sampler, forward
from ring_mlx.generation.drafts import Counts, Draft, Drafter, ForcedOr
from ring_mlx.generation.pace import Pace
from ring_mlx.model.ragged_cache import flush
from ring_mlx.model.tentative import Tentative

NOTHING = Draft([], 0)
# Plain steps of rows that end in different columns, after which they are put flush right: each row that is short costs a write
# of its own in each layer, and to move all rows costs as much as to copy their caches.
FLUSH_AFTER_STEPS = 16


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
        with closing(Speculation(model, cache, [Drafted(picker, held(drafter, picker), max_tokens)], pace)) as steps:
            for given in steps:
                assert picker.given is not None
                yield given[0], picker.given.logprobs[0]


def held(drafter: Drafter, picker: Picker) -> Drafter:
    """The drafter, which drafts only what the picker's constraint allows, if there is one."""
    return drafter if picker.constraint is None else ForcedOr(drafter, picker.constraint)


@dataclass(eq=False)
class Drafted:
    """A sequence whose tokens may be drafted, ``left`` of them at most; of its present step which were read and given."""

    picker: Picker
    drafter: Drafter | None = None
    left: int = sys.maxsize
    counts: Counts = field(default_factory=Counts)
    guess: Draft = NOTHING
    draft: Draft = NOTHING
    tokens: list[int] = field(default_factory=list)
    given: int = 0
    is_compared: bool = False

    def look(self) -> int:
        """Guess the picked token, which need not be known yet; returns by which n-gram or model."""
        if self.drafter is not None:
            guess_one = getattr(self.drafter, "guess", None)
            self.guess = self.drafter.draft(1) if guess_one is None else guess_one()
        return self.guess.length

    def begin(self, token: int, most: int) -> None:
        """Begin a step with the picked token and at most so many drafted ones."""
        most = min(most, self.left - 2)
        self.draft = self.drafter.draft(most) if self.drafter is not None and most > 0 else NOTHING
        self.tokens, self.given = [token, *self.draft.tokens], 0
        self.counts.drafted += len(self.draft.tokens)

    def end(self) -> None:
        """End a step: what was given is read."""
        self.picker.add(mx.array(self.tokens[: self.given], dtype=mx.int32))

    def give(self, following: Picked | None) -> None:
        """Give the picked token; ``following`` comes next, where that is known."""
        self.left -= 1
        self.given += 1
        self.picker.give(following)


class Speculation(Iterator[dict[int, int]]):
    """The rest of the tokens of some rows, each as `speculate` yields them; others may go on from the ``picked`` of each picker.

    One row is plain decoding's: its last token is not read. Of several rows each token is read, and a step of several tokens
    yields those of all rows first, then those of the rows in which more of them come true.

    Clear ``is_timed`` where other work ran since the last token. Of the last step, ``_read`` has the number of its tokens and
    ``_waited`` the seconds that do not count: for the step before, and outside after others than its first token. Those for steps
    before, ``_awaited``, count with the plain step that comes after steps of several tokens, and finds its token ready.

    Args:
        rows: Their first tokens are picked.
        cache: Of one row, or of all with a `RaggedKVCache` in each softmax layer.
        pace: Of so many rows.
    """

    def __init__(self, model: Forward, cache: Any, rows: Iterable[Drafted], pace: Pace) -> None:
        self._model, self._cache, self._rows, self._pace = model, cache, list(rows), pace
        self._is_alone, self.is_timed = len(self._rows) == 1, True
        self._read, self._waited, self._awaited, self._since_cleared, self._plain_steps = 0, 0.0, 0.0, 0, 0
        self._steps = self._all()

    def __next__(self) -> dict[int, int]:
        """The next token of each row that has one by now, by its place among the rows."""
        return next(self._steps)

    def close(self) -> None:
        """Leave in the cache what was given."""
        self._steps.close()
        flush(self._cache)

    def _all(self) -> Generator[dict[int, int]]:
        while not self._is_alone or self._rows[0].left:
            began, read_before = time.perf_counter(), self._read
            self.is_timed = True
            for row in self._rows:
                row.picker.ask()
            wanted = self._wanted()
            yield from self._one() if wanted < 1 else self._several(wanted)
            is_known = self._pace.has_run(self._read)
            is_whole = self._read > 1 or read_before == 1  # a step of one token is computed while the next one runs
            if self.is_timed and (is_whole or read_before):
                seconds = time.perf_counter() - began - self._waited + (0.0 if is_whole else self._awaited)
                self._pace.took(self._read, seconds, is_usual=is_known and is_whole)
            if self._read == 1:
                self._awaited = 0.0
            self._since_cleared += max(row.given for row in self._rows)
            if self._since_cleared >= CLEAR_EVERY_TOKENS:
                self._since_cleared = 0
                mx.clear_cache()

    def _wanted(self) -> int:
        """How many tokens to draft after the picked ones, which need not be known yet."""
        lengths = [row.look() for row in self._rows]
        return min(self._pace.wanted(*lengths), max(row.left for row in self._rows) - 2) if any(lengths) else 0

    def _one(self) -> Iterator[dict[int, int]]:
        """Read the picked tokens and pick the next, which are computed while these are handled."""
        rows, picked = self._rows, [row.picker.ask() for row in self._rows]
        together = self._together(picked)
        following: list[Picked | None] = [None] * len(rows)
        if not self._is_alone or rows[0].left > 1:
            for row, p in zip(rows, picked, strict=True):
                row.picker.add(p.y)
            logits = forward(together[:, None], self._model, self._cache)[:, 0]
            following = [row.picker.pick(logits[n : n + 1]) for n, row in enumerate(rows)]
        tokens = self._ids(picked, together)
        self._read, self._waited = 1, 0.0
        self._pace.count(1, *[1] * len(rows))
        for row, token, found in zip(rows, tokens, following, strict=True):
            self._came(row, token, row.guess, 0)
            row.given = 0
            row.give(found)
        self._plain_steps += 1
        if self._plain_steps == FLUSH_AFTER_STEPS:
            flush(self._cache)
        yield dict(enumerate(tokens))

    def _several(self, wanted: int) -> Iterator[dict[int, int]]:
        """Read the picked tokens and some that may follow; yield those that do, and pick the next."""
        rows, left, self._plain_steps = self._rows, time.perf_counter(), 0
        picked = [row.picker.ask() for row in rows]
        tokens = self._ids(picked, self._together(picked))
        self._waited = time.perf_counter() - left
        self._awaited += self._waited
        for row, token in zip(rows, tokens, strict=True):
            self._came(row, token, row.guess, 0)
        left = time.perf_counter()
        for row, token in zip(rows, tokens, strict=True):
            row.begin(token, wanted)
        self._waited += time.perf_counter() - left  # which is counted by itself
        self._read = max(len(row.tokens) for row in rows)
        padded = [row.tokens + row.tokens[-1:] * (self._read - len(row.tokens)) for row in rows]
        tentative, accepting = Tentative(self._model, self._cache, padded), dict(enumerate(rows))
        try:
            each = [
                row.picker.pick_each(tentative.logits[n, : len(row.tokens)], row.tokens) for n, row in enumerate(rows)
            ]
            while accepting:
                is_first = not rows[0].given
                following = [next(each[n]) for n in accepting]
                for row, found in zip(accepting.values(), following, strict=True):
                    row.give(found)
                left = time.perf_counter()
                yield {n: row.tokens[row.given - 1] for n, row in accepting.items()}
                self._waited += 0.0 if is_first else time.perf_counter() - left
                accepting = {n: row for n, row in accepting.items() if self._accepts(row)}
        finally:
            given = [row.given for row in rows]
            tentative.keep(given)
            self._pace.count(self._read, *given)
            for row in rows:
                row.end()

    def _accepts(self, row: Drafted) -> bool:
        """Whether the next of the row's drafted tokens, if there is one, is what the model chose."""
        if row.given == len(row.tokens):
            return False
        (chosen,), token = self._ids([row.picker.ask()]), row.tokens[row.given]
        if chosen != token:
            self._pace.compared(row.draft.length, False, row.given - 1)
            row.is_compared = True
            return False
        self._came(row, token, row.draft, row.given - 1)
        row.counts.accepted += 1
        return True

    def _came(self, row: Drafted, token: int, draft: Draft, at: int) -> None:
        """Take a token in whose place there was a draft's; the one that ended a step was compared there."""
        if draft.tokens and not row.is_compared:
            self._pace.compared(draft.length, token == draft.tokens[at], at)
        row.is_compared = False
        if row.drafter is not None:
            row.drafter.add(token)

    def _together(self, picked: Sequence[Picked]) -> mx.array:
        """The ids of all rows [B]."""
        if self._is_alone:
            return picked[0].y
        together = mx.concatenate([p.y for p in picked])
        mx.async_eval(together)  # by itself: what is awaited of one call is all that it computes
        return together

    def _ids(self, picked: Sequence[Picked], together: mx.array | None = None) -> list[int]:
        """The ids; whether the logits of one of several rows are finite is asked when its token is used."""
        if self._is_alone:
            return picked[0].ids()
        ids: list[int] = np.asarray(picked[0].y if together is None else together).tolist()
        return ids
