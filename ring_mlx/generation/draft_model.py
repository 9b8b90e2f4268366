"""Drafts from a smaller model with the same tokenizer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import mlx.core as mx

from ring_mlx.generation.decoding import forward, prefill, prefill_step_or_default, step_sizes
from ring_mlx.generation.drafts import MODEL, MOST_TOKENS, Draft, Drafter, Pace
from ring_mlx.model.model import Model
from ring_mlx.model.tentative import Place

LONG = 4  # n-grams of which a fixed number of tokens is drafted rather than by the model


class DraftModel:
    """Drafts what a smaller model finds likeliest.

    The model reads each token once: a draft that comes stays read, and one that does not is taken back with those after it.
    Nothing is read before a draft is asked for, so a draft model that rests costs nothing.

    Args:
        model: With the tokenizer of the model that it drafts for, and as many rows in its embedding.
        tokens: The text so far; `add` brings what follows.
        step_tokens: Tokens of the text that are read at once, by default `prefill_step_or_default`.
    """

    def __init__(self, model: Model, tokens: Iterable[int] = (), step_tokens: int | None = None) -> None:
        self._model, self._step_tokens = model, prefill_step_or_default(step_tokens)
        self._tokens, self._read = list(tokens), 0
        self._forget()

    def add(self, token: int) -> None:
        """Take the next token of the text."""
        self._tokens.append(token)
        if not self._ahead:
            return
        drafted, before = self._ahead.popleft()
        if drafted == token:
            self._read += 1
        else:
            before.go_back()
            self._ahead.clear()

    @property
    def is_full(self) -> bool:
        """Whether the text fills the model's context, so that it drafts no more."""
        return len(self._tokens) + MOST_TOKENS > self._model.config.context_tokens

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next; none where it `is_full`."""
        if self.is_full:
            return Draft([], MODEL)
        try:
            self._read_to(0)
            return Draft(self._likeliest(most), MODEL)
        except BaseException:  # which may have come in the middle of the layers
            self._forget()
            raise

    def catch_up(self) -> None:
        """Read the text but for its last tokens, which the next draft reads."""
        try:
            self._read_to(MOST_TOKENS + 1)
        except BaseException:
            self._forget()
            raise

    def _read_to(self, behind: int) -> None:
        """Read the text if more than so many of its last tokens are unread."""
        unread = mx.array(self._tokens[self._read :], dtype=mx.int32)
        if unread.size <= behind:
            return
        if unread.size <= MOST_TOKENS + 1:
            self._next = self._step(unread)
        else:
            sizes = step_sizes(unread.size, self._step_tokens)
            *_, (_, logits) = prefill(unread, self._model, self._cache, sizes)
            self._next = mx.argmax(logits, axis=-1)
        self._read = len(self._tokens)

    def _likeliest(self, most: int) -> list[int]:
        """The tokens that were read ahead of the text, and more of them, up to the last, which is not read."""
        following, places = [self._next], []
        while len(self._ahead) + len(following) < most:
            places.append(Place(self._cache))
            following.append(self._step(following[-1]))
        self._next = following[-1]
        tokens: list[int] = mx.concatenate(following).tolist()  # type: ignore[assignment]
        self._ahead.extend(zip(tokens, places, strict=False))
        return [*(token for token, _ in self._ahead), tokens[-1]][:most]

    def _step(self, tokens: mx.array) -> mx.array:
        """Read tokens [T]; returns the likeliest one after them [1]."""
        return mx.argmax(forward(tokens[None], self._model, self._cache)[:, 0], axis=-1)

    def _forget(self) -> None:
        """Start with an empty cache."""
        self._cache, self._read = self._model.make_cache(), 0
        self._ahead: deque[tuple[int, Place]] = deque()  # drafts that were read, and where the cache was before each
        self._next = mx.zeros((1,), dtype=mx.int32)


class LookupOrModel:
    """Drafts by prompt lookup or by a model, whichever promises more by what ``pace`` has seen of both.

    Where the number of tokens is fixed, it drafts by long n-grams, else by the model.
    """

    def __init__(self, lookup: Drafter, model: DraftModel, pace: Pace) -> None:
        self._lookup, self._model, self._pace = lookup, model, pace
        self._unused = Draft([], 0)  # what a lookup says in the place of which the model drafts

    def add(self, token: int) -> None:
        """Take the next token."""
        if self._unused.tokens:
            self._pace.compared(self._unused.length, self._unused.tokens[0] == token)
            self._unused = Draft([], 0)
        self._lookup.add(token)
        self._model.add(token)

    def guess(self) -> Draft:
        """The next token by lookup, or none where the model would draft."""
        found = self._lookup.draft(1)
        if self._model.is_full or self._is_better(found):
            return found
        self._unused = found
        return Draft([], MODEL)

    def draft(self, most: int) -> Draft:
        """At most so many tokens that may come next."""
        found = self._lookup.draft(most)
        if self._model.is_full or self._is_better(found):
            return found
        self._model.catch_up()
        began = time.perf_counter()
        found = self._model.draft(most)
        if found.tokens:
            self._pace.drafting(len(found.tokens), time.perf_counter() - began)
        return found

    def _is_better(self, found: Draft) -> bool:
        """Whether a lookup promises more than the model."""
        if not found.tokens or self._pace.always:
            return found.length >= LONG
        return self._pace.best(found.length)[1] <= self._pace.best(MODEL)[1]
