"""A conversation with a model, from any thread."""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ring_mlx.engine.events import Counters, End, Event, Loading, ModelInfo, Sampling, SessionOptions
from ring_mlx.engine.model_thread import ModelThread
from ring_mlx.engine.request import Request
from ring_mlx.errors import RingError, SessionError
from ring_mlx.generation.sampling_ranges import REST
from ring_mlx.generation.thinking import Thinking

if TYPE_CHECKING:
    from ring_mlx.engine.loaded import LoadedModel


class Reply(Iterator[Event]):
    """The events of one request, as they come; may be read on any one thread.

    Raises:
        RingError: From the iteration, after `End`, if the request or the model failed.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._error: RingError | None = None
        self._is_over = False

    def __next__(self) -> Event:
        if self._is_over:
            error, self._error = self._error, None
            raise error or StopIteration
        event = self._request.events.get()
        self._is_over = isinstance(event, (End, RingError))
        if isinstance(event, RingError):
            self._error = event
            return End("error", error=str(event))
        return event

    def stop(self) -> None:
        """End the answer after the present token or prompt step; events up to `End` still come."""
        self._request.stopped.set()


class Session(AbstractContextManager["Session"]):
    """A model that never reads a token twice.

    One long-lived thread loads the model and answers requests in their order. Snapshots keep what it has read: a new
    prompt starts from the deepest one that is its prefix, in memory or on disk.

    Args:
        model: Folder of a checkpoint, or ``owner/name`` on the hub; None is the packaged toy.
        thinking_start, answer_room: How answers start and the tokens kept for them, as `ring_mlx.Thinking` has it.
        on_loading: Told how far loading is, on the session's thread; the first reply tells it as well.
        options: Of `ring_mlx.engine.events.SessionOptions`: ``revision``, ``exact``, ``decay_layer_offset``,
            ``expert_cache_bytes``, ``adapter_path``, ``kv_quantization``, ``memory_budget_bytes``, ``store``,
            ``store_budget_bytes``, ``store_kv_bits``, ``prefill_step_tokens``, ``snapshot_every_tokens``, ``read_ahead``,
            ``speculate``, ``draft_model``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        thinking_start: str = "auto",
        answer_room: int | None = None,
        on_loading: Callable[[Loading], object] | None = None,
        **options: Any,
    ) -> None:
        thinking = Thinking(thinking_start, answer_room)
        named = str(files("ring_mlx") / "demo_model") if model is None else model
        self._thread = ModelThread(SessionOptions(model=named, thinking=thinking, **options), on_loading=on_loading)
        atexit.register(self.close, 5.0)

    def send(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        sampling: Sampling | None = None,
        max_tokens: int = REST,
        thinking_budget: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        aside: bool = False,
    ) -> Reply:
        """Ask for an answer; returns at once, and answers come in the order of the requests.

        Args:
            prompt: Messages with ``role`` and ``content``, rendered by the checkpoint's template; or text that is
                continued as it stands.
            sampling: How tokens are chosen; what it leaves open is what the checkpoint says.
            max_tokens: At most so many; the end of the context may come first. -1 is as many as it holds.
            thinking_budget: Close the thought after so many tokens; None leaves the answer its room.
            tools: Tool descriptions for the template.
            template_options: Further template arguments, such as ``enable_thinking``.
            continue_last: Continue the last (assistant) message instead of answering.
            aside: Answer it beside the conversation, which goes on as if it had not been asked: only while nothing else
                is wanted, with a cache of its own. Any other request ends it after its token or prompt step; `stop` of
                the session does not.

        Returns:
            The events.
        """
        request = Request(
            prompt=copy.deepcopy(prompt),
            sampling=copy.deepcopy(sampling or Sampling()),
            max_tokens=max_tokens,
            thinking_budget=thinking_budget,
            tools=copy.deepcopy(tools),
            template_options=copy.deepcopy(template_options),
            continue_last=continue_last,
            aside=aside,
        )
        self._thread.submit(request)
        return Reply(request)

    def count_tokens(self, text: str) -> int:
        """The tokens of a text; from any thread. Raises SessionError if no model is loaded."""
        return self._loaded.count_tokens(text)

    def check(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        """The tokens of a prompt, which is not read; from any thread.

        Raises:
            RingError: If no model is loaded, or the prompt does not fit its context or this machine's memory.
        """
        return self._loaded.check(Request(prompt=copy.deepcopy(prompt)))

    @property
    def _loaded(self) -> LoadedModel:
        if self._thread.loaded is None:
            raise SessionError("no model is loaded; wait for it.")
        return self._thread.loaded

    def stop(self) -> None:
        """End the oldest unfinished request after its token or prompt step; those behind it stay. From any thread."""
        self._thread.stop_oldest()

    def wait_until_loaded(self, timeout_s: float | None = None) -> ModelInfo:
        """The loaded model. Raises RingError if loading failed or takes longer than ``timeout_s``."""
        if not self._thread.wait_until_loaded(timeout_s):
            raise SessionError(f"the model is not loaded after {timeout_s} s; wait longer.")
        assert self._thread.info is not None
        return self._thread.info

    @property
    def counters(self) -> Counters:
        """Counts of tokens read, reused and generated, and of snapshots."""
        return self._thread.metrics.counters()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Stop what runs, save, and free the model; returns whether the thread is at rest, so that a process may end."""
        atexit.unregister(self.close)
        return self._thread.close(timeout_s)

    def __exit__(self, *_: object) -> None:
        self.close()
