"""The model's thread for the server's threads: requests are prepared here, or refused with an HTTP status."""

from __future__ import annotations

from collections.abc import Callable

from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_thread import Load, ModelThread
from ring_mlx.errors import PromptError, RingError, TokenizerError
from ring_mlx.generation.defaults import filled
from ring_mlx.serve.encoding import Encoder
from ring_mlx.serve.failures import bad, busy
from ring_mlx.serve.protocol import ApiRequest
from ring_mlx.serve.settings import Settings


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
    def encoder(self) -> Encoder:
        """Prepares requests. Raises ApiError 503 if the model is not there, or too many wait."""
        loaded = self.loaded
        if self.state != "ok" or loaded is None:
            raise busy(f"the model is not ready ({self.state}); try again.", 5)
        if sum(not r.is_dropped for r in self._waiting.copy()) >= self.settings.max_queue:
            raise busy(f"{self.settings.max_queue} requests wait already; try again.")
        if self._encoder is None:
            context, options = loaded.model.config.context_tokens, self.settings.template_options
            self._encoder = Encoder(loaded.tokenizer, context, options)
        return self._encoder

    def prepare(self, request: ApiRequest, gone: Callable[[], bool] = lambda: False) -> ApiRequest:
        """Render, encode and measure a request, on the caller's thread; returns the request.

        Raises ApiError if the model is not there, or the request does not fit it; GoneError if the client leaves meanwhile.
        """
        encoder, loaded, prompt = self.encoder, self.loaded, None
        field = "prompt" if request.is_text else "messages"
        assert loaded is not None
        try:
            prompt, renderer = encoder.prompt(request, gone)
            request.prepared = loaded.measured(request, prompt, renderer)
        except TokenizerError as e:
            raise bad(str(e), field, "template_error") from None
        except PromptError as e:
            code = "context_length_exceeded" if prompt is None or prompt.ids else "invalid_value"
            raise bad(str(e), field, code) from None
        request.sampling, rows = filled(request.sampling, loaded.model.sampling), loaded.model.config.vocab_size
        if max([*prompt.ids, *(request.sampling.logit_bias or {})]) >= rows or (request.sampling.top_k or 0) >= rows:
            raise bad(f"a token id or top_k is not below the vocabulary of {rows}.", code="invalid_value")
        return request

    def enter(self, request: ApiRequest) -> None:
        """`submit`, unless too many wait meanwhile. Raises ApiError 503 if too many wait."""
        with self._changed:
            _ = self.encoder
            try:
                self.submit(request)
            except RingError:
                raise busy("the server is closing.") from None
