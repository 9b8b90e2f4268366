"""A conversation with a model, from any thread; knows threads and events, and of MLX only that one thread owns it."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ring_mlx.engine.events import Counters, End, Event, Loading, ModelInfo, Request, Sampling, SessionOptions
from ring_mlx.errors import RingError, SessionError
from ring_mlx.generation.sampling_ranges import REST
from ring_mlx.generation.thinking import Thinking
from ring_mlx.system.install import explained

if TYPE_CHECKING:
    from ring_mlx.engine.worker import Worker
    from ring_mlx.model.kv_quantization import KVQuantization

Job = Callable[["Worker"], None]


class Reply(Iterator[Event]):
    """The events of one request, as they come; may be read on any one thread.

    Raises:
        RingError: From the iteration, after `End`, if the request or the model failed.
    """

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._events: queue.SimpleQueue[Event | RingError | None] = queue.SimpleQueue()
        self._over = False

    def __next__(self) -> Event:
        item = None if self._over else self._events.get()
        if item is None or isinstance(item, RingError):
            self._over = True
            if isinstance(item, RingError):
                raise item
            raise StopIteration
        return item

    def stop(self) -> None:
        """End the answer after the token or prompt step at hand; the events up to `End` still come."""
        self._stopped.set()

    def _put(self, item: Event | RingError | None) -> None:
        self._events.put(item)


class Session(AbstractContextManager["Session"]):
    """A model that never reads a token twice.

    One long-lived thread loads the model and answers requests in the order in which they come. What it has read is
    kept in snapshots: a new prompt starts from the deepest one that is its prefix, in memory or on disk.

    Args:
        model: Folder of a checkpoint, or ``owner/name`` on the hub; None is the packaged toy.
        revision: Branch, tag or commit of a hub repository.
        exact, decay_layer_offset, expert_cache_bytes, adapter_path: As for `ring_mlx.load`.
        kv_quantization: For keys and values of softmax layers, or None.
        memory_budget_bytes: Most bytes of snapshots in memory, but for the one that the present conversation goes on
            from; by default a quarter of what the machine has left, and 0 keeps none.
        store: Folder for snapshots on disk; True is the system's folder for caches (or ``RING_MLX_CACHE``), False
            none.
        store_budget_bytes: Most bytes there for this model.
        store_kv_bits: Keep keys and values there in 8 or 4 bits; None keeps them as they are.
        prefill_step_tokens: Prompt tokens a step, and so how long `stop` may take; by default 2,048 on a GPU, 128 on a CPU.
        snapshot_every_tokens: A snapshot at each multiple of this within a long prompt.
        read_ahead: While nobody waits, read the start of the next prompt: the answer without its thought.
        thinking_start, answer_room: How answers start and the tokens kept for them, as `ring_mlx.Thinking` has it.
        on_loading: Told how far loading is, on the session's thread; the first reply tells it as well.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        exact: bool = False,
        decay_layer_offset: int | str | None = None,
        expert_cache_bytes: int | None = None,
        adapter_path: str | os.PathLike[str] | None = None,
        kv_quantization: KVQuantization | None = None,
        memory_budget_bytes: int | None = None,
        store: str | os.PathLike[str] | bool = True,
        store_budget_bytes: int = 8 << 30,
        store_kv_bits: int | None = None,
        prefill_step_tokens: int | None = None,
        snapshot_every_tokens: int = 4096,
        read_ahead: bool = True,
        thinking_start: str = "auto",
        answer_room: int | None = None,
        on_loading: Callable[[Loading], object] | None = None,
    ) -> None:
        self._options = SessionOptions(
            model=_toy() if model is None else model,
            revision=revision,
            exact=exact,
            decay_layer_offset=decay_layer_offset,
            expert_cache_bytes=expert_cache_bytes,
            adapter_path=adapter_path,
            kv_quantization=kv_quantization,
            memory_budget_bytes=memory_budget_bytes,
            store=store,
            store_budget_bytes=store_budget_bytes,
            store_kv_bits=store_kv_bits,
            prefill_step_tokens=prefill_step_tokens,
            snapshot_every_tokens=snapshot_every_tokens,
            read_ahead=read_ahead,
            thinking=Thinking(thinking_start, answer_room),
        )
        self._jobs: queue.Queue[tuple[Request, Reply] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._unfinished: list[Reply] = []
        self._at_rest = threading.Event()
        self._loaded = threading.Event()
        self._failure: RingError | None = None
        self._loading: list[Loading] = []
        self._on_loading = on_loading
        self._listeners: list[Reply] = []
        self._info: ModelInfo | None = None
        self._counters = Counters()
        self._thread = threading.Thread(target=self._run, name="ring-mlx session", daemon=True)
        self._thread.start()
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
    ) -> Reply:
        """Ask for an answer; returns at once, and answers come in the order of asking.

        Args:
            prompt: Messages with ``role`` and ``content``, rendered by the checkpoint's template; or text that is
                continued as it stands.
            sampling: How tokens are chosen; what it leaves open is what the checkpoint says.
            max_tokens: At most so many; the end of the context may come first. -1 is as many as it holds.
            thinking_budget: Close the thought after so many tokens; None leaves the answer its room.
            tools: Tool descriptions for the template.
            template_options: Further template arguments, such as ``enable_thinking``.
            continue_last: Continue the last (assistant) message instead of answering.

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
        )
        reply = Reply(request.stopped)
        with self._lock:
            if self._closed:
                raise SessionError("the session is closed; make another one.")
            if not self._loaded.is_set():
                for event in self._loading:
                    reply._put(event)
                self._listeners.append(reply)
            self._unfinished.append(reply)
            self._jobs.put((request, reply))
        return reply

    def stop(self) -> None:
        """End the oldest unfinished request after its token or prompt step; those behind it stay. From any thread."""
        with self._lock:
            for reply in self._unfinished[:1]:
                reply.stop()

    def wait_until_loaded(self, timeout_s: float | None = None) -> ModelInfo:
        """What has been loaded.

        Raises:
            RingError: If loading failed or takes longer than ``timeout_s``.
        """
        if not self._loaded.wait(timeout_s):
            raise SessionError(f"the model is not loaded after {timeout_s} s; wait longer.")
        if self._failure is not None:
            raise self._failure
        assert self._info is not None
        return self._info

    @property
    def counters(self) -> Counters:
        """What has been read, reused and generated, as of the last finished piece of work."""
        return self._counters

    def close(self, timeout_s: float = 30.0) -> bool:
        """Stop what runs, save, and free the model; returns whether the thread is at rest, so that a process may end."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            for reply in self._unfinished:
                reply.stop()
        self._jobs.put(None)
        return self._at_rest.wait(timeout_s)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """The thread's life. It comes to rest and never ends: see `rest`."""
        worker = self._load()
        while (job := self._next_job(worker)) is not None:
            self._answer(worker, *job)
            if worker is not None:
                self._quietly(lambda w: w.use_idle_time(lambda: not self._jobs.empty()), worker)
        if worker is not None:
            self._quietly(lambda w: w.save(), worker)
            free, worker = worker.free_memory, None
            free()
        rest(self._at_rest)

    def _next_job(self, worker: Worker | None) -> tuple[Request, Reply] | None:
        """Wait for one; meanwhile a system that is short of memory gets back what nothing is answered from."""
        while worker is not None and worker.pressure.idle_s is not None:
            try:
                return self._jobs.get(timeout=worker.pressure.idle_s)
            except queue.Empty:
                self._quietly(lambda w: w.pressure.look(), worker)
        return self._jobs.get()

    def _load(self) -> Worker | None:
        worker = None
        try:
            # Not at the top: it brings MLX, for which a front end's first screen does not wait.
            from ring_mlx.engine.worker import Worker

            worker = Worker.load(self._options, self._tell_loading)
            self._info = worker.info
        except Exception as e:  # noqa: BLE001 whatever happens is told to those who ask
            self._failure = _as_ring_error(e)
        with self._lock:
            self._loaded.set()
            self._listeners.clear()
        return worker

    def _tell_loading(self, event: Event) -> None:
        assert isinstance(event, Loading)
        with self._lock:
            if self._closed:
                raise SessionError("the session was closed while the model was loaded; make another one.")
            self._loading.append(event)
            for reply in self._listeners:
                reply._put(event)
        if self._on_loading is not None:
            self._on_loading(event)

    def _answer(self, worker: Worker | None, request: Request, reply: Reply) -> None:
        try:
            if worker is not None:
                worker.answer(request, reply._put)
            elif self._closed:
                reply._put(End("stopped"))
            else:
                raise self._failure or SessionError("the model is not loaded; make another session.")
        except Exception as e:  # noqa: BLE001 as above
            error = _as_ring_error(e)
            reply._put(End("error", error=str(error)))
            reply._put(error)
        finally:
            if worker is not None:
                self._counters = worker.counters
            with self._lock:
                self._unfinished.remove(reply)
            reply._put(None)

    def _quietly(self, work: Job, worker: Worker) -> None:
        """Work that nobody waits for, and whose failure costs nobody an answer."""
        try:
            work(worker)
        except Exception as e:  # noqa: BLE001 the next request starts from what is known to be good
            worker.forget_live()
            with contextlib.suppress(Warning):  # where warnings are errors, that ends no thread either
                warnings.warn(f"{_as_ring_error(e)} Answers are not affected.", stacklevel=2)
        self._counters = worker.counters


def rest(at_rest: threading.Event) -> None:
    """Say that a thread which ran MLX is done, and wait for ever, as a daemon.

    What MLX keeps for a thread is freed when the thread ends, which needs the interpreter: a process that exits meanwhile
    aborts.
    """
    at_rest.set()
    threading.Event().wait()


def _as_ring_error(e: Exception) -> RingError:
    if isinstance(e, RingError):
        return e
    if isinstance(e, ImportError):
        return explained(e)
    return SessionError(f"{type(e).__name__}: {str(e)[:200]}; shorten the prompt if memory is short, or report this.")


def _toy() -> str:
    return str(files("ring_mlx") / "demo_model")
