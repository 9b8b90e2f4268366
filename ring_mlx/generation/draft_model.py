"""Drafts from a smaller model with the same tokenizer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from ring_mlx.generation.decoding import forward, prefill, prefill_step_or_default, step_sizes
from ring_mlx.generation.drafts import MODEL, MOST_TOKENS, Draft, Drafter
from ring_mlx.generation.pace import Pace
from ring_mlx.model.model import Model
from ring_mlx.model.tentative import Place

LONG = 4  # n-grams of which a fixed number of tokens is drafted rather than by the model


class DraftCache:
    """A draft model's cache, and the number of tokens of the text that it has read; here of one text only."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cache, self.read = model.make_cache(), 0

    def forget(self) -> None:
        """Begin with nothing read."""
        self.cache, self.read = self._model.make_cache(), 0

    def next_place(self, end: int) -> int:
        """Where reading up to ``end`` must pause, so that the cache can be kept there."""
        return end

    def keep(self, tokens: Sequence[int]) -> None:
        """Keep what the cache is now, after these tokens, if another text may go on from here."""


class DraftModel:
    """Drafts what a smaller model finds likeliest.

    The model reads each token once: a draft that comes stays read, and one that does not is taken back with those after it.
    Nothing is read before a draft is asked for, so a draft model that rests costs nothing.

    Args:
        model: With the tokenizer of the model that it drafts for, and as many rows in its embedding.
        tokens: The text so far; `add` brings what follows.
        step_tokens: Tokens of the text that are read at once, by default `prefill_step_or_default`.
        cache: Has read a part of the text, not all of it; by default nothing.
    """

    def __init__(
        self,
        model: Model,
        tokens: Iterable[int] = (),
        step_tokens: int | None = None,
        cache: DraftCache | None = None,
    ) -> None:
        self._model, self._step_tokens = model, prefill_step_or_default(step_tokens)
        self._tokens, self._held = list(tokens), cache or DraftCache(model)
        self._ahead: deque[tuple[int, Place]] = deque()  # drafts that were read, and where the cache was before each
        self._next = mx.zeros((1,), dtype=mx.int32)

    def add(self, token: int) -> None:
        """Take the next token of the text."""
        self._tokens.append(token)
        if not self._ahead:
            return
        drafted, before = self._ahead.popleft()
        if drafted == token:
            self._held.read += 1
        else:
            before.go_back()
            self._ahead.clear()

    @property
    def is_full(self) -> bool:
        """Whether the text fills the model's context, so that it drafts no more."""
        return len(self._tokens) + MOST_TOKENS > self._model.config.context_tokens

    @property
    def unread(self) -> int:
        """Tokens of the text that are read before the next draft, beside the few that a draft reads itself."""
        count = len(self._tokens) - self._held.read
        return count if count > MOST_TOKENS + 1 else 0

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next; none where it `is_full`."""
        if self.is_full:
            return Draft([], MODEL)
        with self._forgetting():
            self._read_to(len(self._tokens))
            return Draft(self._likeliest(most), MODEL)

    def next_piece(self) -> int:
        """Tokens that `catch_up` reads, one step at most."""
        return min(self.unread, self._step_tokens)

    def catch_up(self) -> None:
        """Read a step of the text if more than its last tokens are unread."""
        with self._forgetting():
            self._read_to(self._held.read + self.next_piece())

    def end(self) -> None:
        """The text ends here: keep what was read of it."""
        with self._forgetting():
            if self._ahead:
                self._ahead[0][1].go_back()
                self._ahead.clear()
            self._held.keep(self._tokens[: self._held.read])

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Start over after a failure, which may have come in the middle of the layers."""
        try:
            yield
        except BaseException:
            self._held.forget()
            self._ahead.clear()
            raise

    def _read_to(self, end: int) -> None:
        """Read the text up to a place, pausing where the cache is to be kept."""
        held = self._held
        while held.read < end:
            place = held.next_place(end)
            unread = mx.array(self._tokens[held.read : place], dtype=mx.int32)
            if unread.size <= MOST_TOKENS + 1:
                self._next = self._step(unread)
            else:
                *_, (_, logits) = prefill(unread, self._model, held.cache, step_sizes(unread.size, self._step_tokens))
                self._next = mx.argmax(logits, axis=-1)
            held.read = place
            if place < end:
                held.keep(self._tokens[:place])

    def _likeliest(self, most: int) -> list[int]:
        """The tokens that were read ahead of the text, and more of them, up to the last, which is not read."""
        following, places = [self._next], []
        while len(self._ahead) + len(following) < most:
            places.append(Place(self._held.cache))
            following.append(self._step(following[-1]))
        self._next = following[-1]
        tokens: list[int] = mx.concatenate(following).tolist()  # type: ignore[assignment]
        self._ahead.extend(zip(tokens, places, strict=False))
        return [*(token for token, _ in self._ahead), tokens[-1]][:most]

    def _step(self, tokens: mx.array) -> mx.array:
        """Read tokens [T]; returns the likeliest one after them [1]."""
        return mx.argmax(forward(tokens[None], self._model, self._held.cache)[:, 0], axis=-1)


class LookupOrModel:
    """Drafts by prompt lookup or by a model, whichever promises more by what ``pace`` has seen of both.

    Where the number of tokens is fixed, it drafts by long n-grams, else by the model.
    """

    def __init__(self, lookup: Drafter, model: DraftModel, pace: Pace) -> None:
        self.lookup, self._model, self._pace = lookup, model, pace
        self._unused = Draft([], 0)  # what a lookup says in the place of which the model drafts

    def add(self, token: int) -> None:
        """Take the next token."""
        if self._unused.tokens:
            self._pace.compared(self._unused.length, self._unused.tokens[0] == token)
            self._unused = Draft([], 0)
        self.lookup.add(token)
        self._model.add(token)

    def guess(self) -> Draft:
        """The next token by lookup, or none where the model would draft."""
        found = self.lookup.draft(1)
        if self._model.is_full or self._is_better(found) or not self._is_ready():
            return found
        self._unused = found
        return Draft([], MODEL)

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next."""
        found = self.lookup.draft(most)
        if self._model.is_full or self._is_better(found) or not self._is_ready():
            return found
        began = time.perf_counter()
        found = self._model.draft(most)
        if found.tokens:
            self._pace.drafting(len(found.tokens), time.perf_counter() - began)
        return found

    def end(self) -> None:
        """The text ends here."""
        self._model.end()

    def _is_ready(self) -> bool:
        """Whether the model has read the text, of which it reads a step at a time where that may be."""
        while count := self._model.next_piece():
            if not self._pace.may_read(count):
                return False
            mx.synchronize()  # what runs now is no part of its time
            began = time.perf_counter()
            self._model.catch_up()
            self._pace.reading(count, time.perf_counter() - began)
            if not self._pace.always:
                return not self._model.next_piece()
        return True

    def _is_better(self, found: Draft) -> bool:
        """Whether a lookup promises more than the model."""
        if not found.tokens or self._pace.always:
            return found.length >= LONG
        return self._pace.best(found.length)[1] <= self._pace.best(MODEL)[1]
