"""Turns requests into prompts that fit the model's context; others are refused before they cost time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.engine.branches import Prompt, Renderer, encode
from ring_mlx.engine.loaded import renderer_of
from ring_mlx.errors import PromptError
from ring_mlx.generation.stream import encode_prompt
from ring_mlx.generation.thinking import THINK_END
from ring_mlx.serve.failures import GoneError
from ring_mlx.serve.protocol import ApiRequest

LARGE_BYTES, POLL_S = 1 << 16, 0.05
# After a large request the next one waits for so many times as long as it took, but not longer than so many seconds.
REST, REST_S = 3.0, 0.3
# Text of so many bytes a token of the context is encoded at once; longer text is counted before, piece by piece.
PLAUSIBLE_BYTES, PIECE_CHARS = 4, 1 << 14


class Encoder:
    """Renders and encodes prompts of at most ``context_tokens``; any thread may call it."""

    def __init__(
        self, tokenizer: TokenizerWrapper, context_tokens: int, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._context, self._options = tokenizer, context_tokens, template_options
        self._longest_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._large, self._rests_until = threading.Lock(), 0.0

    @contextmanager
    def turn(self, size: int, gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for this large request's turn: they are prepared one at a time, with pauses, to leave the processor to others.

        Raises GoneError if the client leaves while it waits.
        """
        if size <= LARGE_BYTES:
            yield
            return
        while not self._large.acquire(timeout=POLL_S):
            if gone():
                raise GoneError
        try:
            while (left := self._rests_until - time.monotonic()) > 0:
                if gone():
                    raise GoneError
                time.sleep(min(left, POLL_S))
            started = time.monotonic()
            try:
                yield
            finally:
                ended = time.monotonic()
                self._rests_until = ended + min(REST * (ended - started), REST_S)
        finally:
            self._large.release()

    def prompt(self, request: ApiRequest, gone: Callable[[], bool]) -> tuple[Prompt, Renderer | None]:
        """The prompt of a request, which may be far too long, and of a chat its renderer.

        Raises PromptError if it is certain to exceed the context; TokenizerError if the template refuses the messages;
        GoneError if the client leaves meanwhile.
        """
        given = request.prompt
        if not request.is_text:
            # Before rendering, since templates are rendered one at a time, for the model's thread too.
            self._check("".join(_certain(request)), gone)
            renderer = renderer_of(request, self._tokenizer, self._options)
            text = renderer.text(given)
            self._check(text, gone)
            return encode(self._tokenizer, text), renderer
        text = given if isinstance(given, str) else ""
        self._check(text, gone)
        if not text and len(given) > self._context:
            raise self._too_long(len(given))
        return Prompt(text, encode_prompt(self._tokenizer, given), None), None

    def _check(self, text: str, gone: Callable[[], bool]) -> None:
        size, count = len(text.encode()), 0
        if size > self._context * self._longest_bytes:
            raise self._too_long(-(-size // self._longest_bytes))
        if size <= self._context * PLAUSIBLE_BYTES:
            return
        for at in range(0, len(text), PIECE_CHARS):
            if gone():
                raise GoneError
            count += len(self._tokenizer.encode(text[at : at + PIECE_CHARS], add_special_tokens=False))
            if count > self._context * 5 // 4:  # a cut may split a token, but not every fifth one
                raise self._too_long(count)

    def _too_long(self, count: int) -> PromptError:
        return PromptError(
            f"at least {count} tokens exceed the context of {self._context}; shorten the prompt or use a checkpoint "
            "with a longer context."
        )


def _certain(request: ApiRequest) -> Iterator[str]:
    """The texts of a chat that every template keeps; of an answer only the part after its thought."""
    for message in request.prompt:
        content = message["content"]
        yield content.rpartition(THINK_END)[2] if message["role"] == "assistant" else content
    if request.tools:
        yield json.dumps(request.tools, ensure_ascii=False)
