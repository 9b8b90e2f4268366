"""Holds one answer to its grammar: what may come next, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ring_mlx.errors import GrammarError
from ring_mlx.generation.forms import Form
from ring_mlx.generation.grammars import Grammars, said
from ring_mlx.generation.thought_end import THINK_END

TAG = THINK_END.encode()
WORD = 32


class Constraint:
    """The tokens that may come next in one answer.

    In a thought all may come but those that end the answer: an answer of a form has a thought that ends. The first
    ``</think>`` ends it, in code or not (`ring_mlx.generation.thought_end.ThoughtEnd`). Then only those that the grammar
    allows may come, and after its end only stop tokens. A stop token is never given to the grammar.

    Args:
        is_thinking: Whether the answer begins in a thought.
        before: The beginning of the answer, which the prompt has.

    Raises GrammarError if that is no beginning of what the form allows, or as `Grammars.compiled`.
    """

    def __init__(self, grammars: Grammars, form: Form, is_thinking: bool, before: str = "") -> None:
        compiled = grammars.compiled(form, is_thinking)
        self._grammars, self._matcher, self.is_thinking = grammars, compiled.matcher.deep_copy(), is_thinking
        self.left_out = compiled.left_out
        self._tail, self._is_over, self._failure = b"", False, ""
        if before and not self._follow_text(before.encode(errors="replace")):
            raise GrammarError("the last message, which is to be continued, is no beginning of the form.", "messages")

    @property
    def _is_active(self) -> bool:
        return not (self.is_thinking or self._is_over or self._failure)

    def take(self, tokens: Iterable[int]) -> None:
        """Take the tokens that came next."""
        for token in tokens:
            if token in self._grammars.stops:
                self._is_over = True
            elif self.is_thinking:
                self._think(self._grammars.bytes_of(token))
            elif self._is_active and not self._matcher.consume_token(token):
                self._fail()

    def masked(self, logits: mx.array) -> mx.array:
        """Logits [1, vocab] without the tokens that may not come next."""
        if self.is_thinking:
            return mx.where(_stops(self._grammars.stops, logits.shape[-1]), -mx.inf, logits)
        if not self._is_active:
            return logits
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        if self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            self._fail()
            return logits
        return _only(logits, mx.array(words))

    def forced(self) -> list[int]:
        """Tokens that must come next, one after the other."""
        return list(self._matcher.compute_ff_tokens()) if self._is_active else []

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may come next, so far as is known."""
        return self._matcher.validate_tokens(list(tokens)) if self._is_active else len(tokens)

    def check(self) -> None:
        """Raises GrammarError if the answer left its grammar, or that took too much work."""
        if self._failure:
            raise GrammarError(f"the answer cannot go on: {self._failure}; simplify the form.")

    def _think(self, text: bytes) -> None:
        text = self._tail + text
        at = text.find(TAG)
        self._tail = text[1 - len(TAG) :]
        if at >= 0:
            self.is_thinking = False
            if not self._follow_text(text[at + len(TAG) :]):
                self._fail()

    def _follow_text(self, text: bytes) -> bool:
        return not text or self._matcher.consume_tokens(self._grammars.tokens.tokenize_bytes(text))

    def _fail(self) -> None:
        self._failure = said(self._matcher) or "nothing may come next"


@lru_cache(maxsize=8)
def _stops(stops: frozenset[int], vocabulary: int) -> mx.array:
    """Whether each id [vocab] is a stop token."""
    found = np.zeros(vocabulary, dtype=bool)
    found[[i for i in stops if i < vocabulary]] = True
    return mx.array(found)


@mx.compile
def _only(logits: mx.array, words: mx.array) -> mx.array:
    """Logits [1, vocab] where the bits of words [vocab / 32] are set, the lowest bit first, else minus infinity."""
    bits = (words[:, None] >> mx.arange(WORD, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(1, -1)[:, : logits.shape[-1]].astype(mx.bool_), logits, -mx.inf)
