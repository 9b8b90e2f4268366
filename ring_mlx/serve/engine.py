"""The model's thread for the server's threads: requests are prepared here, or refused with an HTTP status.

Prompts that do not fit the model's context are refused before they cost time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.engine.branches import Prompt, Renderer, encode
from ring_mlx.engine.events import Sampling, SessionOptions
from ring_mlx.engine.loaded import renderer_of
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_thread import Load, ModelThread
from ring_mlx.engine.request import Request
from ring_mlx.errors import GrammarError, PromptError, RingError, SessionError, TokenizerError
from ring_mlx.generation.defaults import filled
from ring_mlx.generation.stream import encode_prompt
from ring_mlx.generation.thought_end import THINK_END
from ring_mlx.serve.failures import ApiError, GoneError, bad, busy, cannot
from ring_mlx.serve.left_out import LeftOut
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.turns import with_system, without_oldest
from ring_mlx.system.terminal_text import whole_text


@dataclass(frozen=True, kw_only=True)
class Settings(SessionOptions):
    """Of the model's side, besides `SessionOptions`.

    Args:
        name: What clients call the model.
        sampling: Used where a request gives no value; its own missing values are the checkpoint's.
        system_prompt: Of conversations that have none.
        max_batch, max_reading: See `SessionOptions`.
        max_queue: Requests that wait beyond those; more are refused.
        prefill_step_tokens: Prompt tokens a step, between two tokens of the others.
    """

    name: str = field(kw_only=False)
    sampling: Sampling = field(default_factory=Sampling)
    system_prompt: str = ""
    max_batch: int = 8
    max_reading: int | None = None
    max_queue: int = 64
    prefill_step_tokens: int | None = 512

    is_shared: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = (*SessionOptions.positive, "max_queue")


# Text of so many bytes a token of the context is encoded at once; longer text is counted before, piece by piece.
PLAUSIBLE_BYTES, PIECE_CHARS = 4, 1 << 14


class Encoder:
    """Renders and encodes prompts of at most ``context_tokens``; any thread may call it."""

    def __init__(
        self, tokenizer: TokenizerWrapper, context_tokens: int, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._context, self._options = tokenizer, context_tokens, template_options
        self._longest_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

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
            text = renderer.text(given, request.continue_last)
            self._check(text, gone)
            return encode(self._tokenizer, text), renderer
        text = given if isinstance(given, str) else ""
        self._check(text, gone)
        if not text and len(given) > self._context:
            raise self._too_long(len(given))
        return Prompt(text, encode_prompt(self._tokenizer, given), None), None

    def ids(self, text: str, gone: Callable[[], bool]) -> list[int]:
        """The ids of a text, which is not rendered. Raises as `prompt`."""
        self._check(text, gone)
        ids = [int(i) for i in self._tokenizer.encode(whole_text(text), add_special_tokens=False)] if text else []
        if len(ids) > self._context:
            raise self._too_long(len(ids))
        return ids

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


class Engine(ModelThread):
    """Loads a model on a thread of its own and answers requests there, several at once."""

    def __init__(self, settings: Settings, metrics: Metrics, load: Load | None = None) -> None:
        self.settings = settings
        self._encoder: Encoder | None = None
        super().__init__(settings, load, metrics)

    @property
    def context_tokens(self) -> int | None:
        """The model's context, once it is loaded."""
        return self.info.context_tokens if self.info is not None else None

    @property
    def held_bytes(self) -> int:
        """Memory that is free again once the model is let go."""
        loaded, gauges = self.loaded, self.metrics.gauges
        if loaded is None:
            return 0
        return loaded.weight_bytes + int(gauges.get("snapshot_bytes", 0) + gauges.get("batch_bytes", 0))

    @property
    def encoder(self) -> Encoder:
        """Prepares requests. Raises ApiError 503 if the model is not there."""
        loaded = self.loaded
        if self.state != "ok" or loaded is None:
            raise busy(f"the model is not ready ({self.state}); try again.", 5)
        if self._encoder is None:
            context, options = loaded.model.config.context_tokens, self.settings.template_options
            self._encoder = Encoder(loaded.tokenizer, context, options)
        return self._encoder

    def prepare(self, request: ApiRequest, gone: Callable[[], bool] = lambda: False) -> ApiRequest:
        """Render, encode and measure a request, on the caller's thread; returns the request.

        Raises ApiError if the model is not there, or the request does not fit it; GoneError if the client leaves meanwhile.
        """
        system = self.settings.system_prompt
        if system and not request.is_text and request.prompt[0]["role"] != "system":
            request.prompt = with_system(system, request.prompt)
        while True:
            try:
                return self._prepare(request, gone)
            except ApiError as e:
                shorter = without_oldest(request.prompt) if request.truncates else request.prompt
                if e.code != "context_length_exceeded" or len(shorter) == len(request.prompt):
                    raise
                request.prompt = shorter

    def _prepare(self, request: ApiRequest, gone: Callable[[], bool]) -> ApiRequest:
        encoder, loaded, prompt = self.encoder, self.loaded, None
        field = "prompt" if request.is_text else "messages"
        assert loaded is not None
        try:
            prompt, renderer = encoder.prompt(request, gone)
            if request.echo:
                request.echoed = str(prompt.text or loaded.tokenizer.decode(prompt.ids))
            if request.prompt_logprobs and not loaded.can_tell_prompts:
                raise cannot(
                    "logprobs of a prompt are not told by several machines; leave echo or logprobs out.", "echo"
                )
            request.prepared = loaded.measured(request, prompt, renderer)
        except GrammarError as e:
            raise bad(str(e), e.param, "invalid_value") from None
        except TokenizerError as e:
            raise bad(str(e), field, "template_error") from None
        except PromptError as e:
            code = "context_length_exceeded" if prompt is None or prompt.ids else "invalid_value"
            raise bad(str(e), field, code) from None
        try:
            request.predicted = encoder.ids(request.prediction, gone)
        except PromptError as e:
            raise bad(f"the prediction: {e}", "prediction", "invalid_value") from None
        request.sampling, rows = filled(request.sampling, loaded.model.sampling), loaded.model.config.vocab_size
        if (
            max([*prompt.ids, *request.predicted, *request.stop_ids, *(request.sampling.logit_bias or {})]) >= rows
            or (request.sampling.top_k or 0) >= rows
        ):
            raise bad(f"a token id or top_k is not below the vocabulary of {rows}.", code="invalid_value")
        if request.prepared.constraint is not None:
            left_out = LeftOut(dict.fromkeys((*request.left_out, *request.prepared.constraint.left_out), True))
            request.left_out = left_out.names
        return request

    def enter(self, request: ApiRequest) -> None:
        """`submit` in place of the last request of another client that has more of them, if too many wait.

        Raises ApiError 503 if too many wait, or the model is gone meanwhile.
        """
        with self._changed:
            if (last := self.check(request.client)) is not None:
                last.stopped.set()
                self._waiting.remove(last)
                last.end(SessionError(self._full))
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ApiError 503 if the model was let go meanwhile."""
        try:
            super().submit(request)
        except RingError:
            raise busy("the server is closing.") from None

    def check(self, client: str) -> Request | None:
        """Whether one more request of a client may wait; returns the one that it would put out of a full queue.

        Raises ApiError 503 if none may, or the model is not there.
        """
        _ = self.encoder
        waiting = [r for r in self._waiting.copy() if not r.is_dropped]
        if len(waiting) < self.settings.max_queue:
            return None
        counts = Counter(r.client for r in waiting)
        (most, count), *_ = counts.most_common(1)
        if count < counts[client] + 2:
            raise busy(self._full)
        return next(r for r in reversed(waiting) if r.client == most)

    @property
    def _full(self) -> str:
        return f"{self.settings.max_queue} requests wait already; try again."
