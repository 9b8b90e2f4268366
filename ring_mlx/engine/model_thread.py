"""The thread that owns a model: loads it, and between its steps takes in requests from any thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ring_mlx.engine.events import End, Loading, ModelInfo, SessionOptions
from ring_mlx.engine.fairness import ClientTurns
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.request import Request, as_ring_error
from ring_mlx.errors import RingError, SessionError
from ring_mlx.system.terminal_text import note
from ring_mlx.system.turn import DEVICE

if TYPE_CHECKING:
    from ring_mlx.engine.loaded import LoadedModel
    from ring_mlx.engine.scheduler import Scheduler

Load = Callable[[SessionOptions, Callable[..., object]], "LoadedModel"]

# How long the threads of requests have to pass on that all ends.
TELLING_S = 0.5
IDLE_S = 60.0


class ModelLostError(BaseException):
    """The model is unusable, so all requests fail.

    It derives from BaseException so that handlers of a single request do not catch it.
    """

    def __init__(self, error: RingError) -> None:
        super().__init__(str(error))
        self.error = error


class ModelThread:
    """Answers requests in the order in which they come, as many at once as the options say.

    Args:
        load: Loads the model and reports progress to its second argument; by default `LoadedModel.load`.
        on_loading: Called with the progress of loading, on the model's thread; waiting requests get it too.
    """

    def __init__(
        self,
        options: SessionOptions,
        load: Load | None = None,
        metrics: Metrics | None = None,
        on_loading: Callable[[Loading], object] | None = None,
    ) -> None:
        self.options, self.metrics = options, metrics or Metrics()
        self._load_model, self._on_loading = load, on_loading
        self._waiting: deque[Request] = deque()
        self._sent: list[Request] = []
        self._turns = ClientTurns()
        self._loading: list[Loading] = []
        self._changed = threading.Condition()
        self._closed = self._is_over = False
        self.loaded: LoadedModel | None = None
        self.info: ModelInfo | None = None
        self._is_loaded, self._at_rest = threading.Event(), threading.Event()
        self.failure: RingError | None = None
        start(self._run)

    @property
    def state(self) -> str:
        """``loading``, ``ok``, ``failed`` or ``closed``."""
        if self._closed:
            return "closed"
        return "failed" if self.failure or self._at_rest.is_set() else "ok" if self._is_loaded.is_set() else "loading"

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def wait_until_loaded(self, timeout_s: float | None = None) -> bool:
        """Whether the model is loaded. Raises RingError if loading failed."""
        done = self._is_loaded.wait(timeout_s)
        if self.failure is not None:
            raise self.failure
        return done

    def submit(self, request: Request) -> None:
        """Queue a request; its events tell the rest. Raises SessionError if the thread is closed."""
        with self._changed:
            if self._closed:
                raise SessionError("the session is closed; make another one.")
            if self._is_over:
                request.end(self._refusal)
                return
            for event in () if self._is_loaded.is_set() else self._loading:
                request.events.put(event)
            self._sent = [r for r in self._sent if not r.is_over]
            if not request.aside:
                self._end_asides()
            self._sent.append(request)
            self._waiting.append(request)
            self._changed.notify()

    def drop(self, request: Request) -> None:
        """Drop a request whose answer is not wanted any more; its place is free after the present step."""
        request.drop()
        with self._changed:
            self._changed.notify()

    def stop_oldest(self) -> None:
        """End the oldest request that is not over, after its token or prompt step."""
        with self._changed:
            for request in [r for r in self._sent if not (r.is_over or r.aside)][:1]:
                request.stopped.set()

    def abandon(self) -> None:
        """Tell every request, from any thread, that the process ends: the model's thread may wait for a lost rank for ever."""
        for request in list(self._sent):
            request.end(SessionError("a process that holds a part of the model is lost, so the server ends."))
        time.sleep(TELLING_S)

    def gauges(self) -> dict[str, float]:
        """Present numbers of waiting and running requests and of snapshots."""
        return {"queue_length": len(self._waiting), **self.metrics.gauges}

    def close(self, timeout_s: float = 30.0) -> bool:
        """Stop what runs, save snapshots, free the model; returns whether the thread is at rest."""
        with self._changed:
            self._closed = True
            for request in self._sent:
                request.stopped.set()
            self._changed.notify()
        return self._at_rest.wait(timeout_s)

    def _run(self) -> None:
        """All that is done on the thread; see `start`."""
        scheduler = self._load()
        try:
            while scheduler is not None and not self._closed:
                self._turn(scheduler)
            while scheduler is not None and scheduler.busy:
                scheduler.step()
        except ModelLostError as e:
            self.failure = e.error
        except Exception as e:  # noqa: BLE001 nothing may end the thread with requests unanswered
            self.failure = SessionError(f"the model's thread failed ({type(e).__name__}: {e}); start again.")
            note(traceback.format_exc())
        if scheduler is not None and self.failure is not None:
            scheduler.fail_all(SessionError(str(self.failure)))
        self._refuse_waiting()
        if scheduler is not None:
            scheduler.release()
            with contextlib.suppress(Warning):
                scheduler.save()
            free, scheduler, self.loaded = scheduler.free_memory, None, None
            free()
        self._at_rest.set()

    def _load(self) -> Scheduler | None:
        # Not at the top: they bring MLX, for which a front end's first screen does not wait.
        from ring_mlx.engine.loaded import LoadedModel
        from ring_mlx.engine.scheduler import Scheduler

        scheduler = None
        try:
            self._tell_loading(0, 0)
            self.loaded = (self._load_model or LoadedModel.load)(self.options, self._tell_loading)
            self.info = self.loaded.info
            scheduler = Scheduler(self.loaded, self.metrics)
        except Exception as e:  # noqa: BLE001 every failure is sent to the waiting requests
            self.failure = as_ring_error(e)
        with self._changed:
            self._is_loaded.set()
        return scheduler

    def _tell_loading(self, done: float, total: float, *_: object) -> None:
        event = Loading(Path(self.options.model).name, int(done), int(total))
        with self._changed:
            if self._closed:
                raise SessionError("the session was closed while the model was loaded; make another one.")
            self._loading.append(event)
            for request in self._waiting:
                request.events.put(event)
        if self._on_loading is not None:
            self._on_loading(event)

    def _turn(self, scheduler: Scheduler) -> None:
        """One iteration: let dropped requests go, admit one, step. When idle, read ahead and save, then wait."""
        with self._changed:
            for request in [r for r in self._waiting if r.is_dropped]:
                self.metrics.count("requests_finished_total", reason="cancelled")
                request.end(End("stopped"))
                self._waiting.remove(request)
            arrived = self._next(scheduler)
        scheduler.drop()
        if arrived is not None and scheduler.has_room(arrived):
            with self._changed:
                self._waiting.remove(arrived)
                self._turns.take(arrived.client, (r.client for r in self._waiting))
            with DEVICE:
                scheduler.admit(arrived)
        elif not scheduler.busy:
            with contextlib.suppress(Warning):  # where warnings are errors, that ends no thread either
                scheduler.use_idle_time(lambda: DEVICE.is_held or self._is_wanted())
            with self._changed:
                aside = self._waiting.popleft() if self._waiting and not self._is_wanted() else None
                if aside is None and not self._is_wanted():
                    self._changed.wait(scheduler.pressure.idle_s or IDLE_S)
            if aside is not None:
                scheduler.admit(aside)
            return
        if scheduler.busy:
            with DEVICE:
                scheduler.step(self._is_wanted)

    def _next(self, scheduler: Scheduler) -> Request | None:
        """Whose turn it is to get a place: the client with the fewest, then the one that got its last one first."""
        waiting = [r for r in self._waiting if not r.aside]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        places = scheduler.places()
        return min(waiting, key=lambda r: (places[r.client], self._turns.last(r.client)))

    def _is_wanted(self) -> bool:
        with self._changed:  # which its own thread may hold already
            return self._closed or any(not r.aside for r in self._waiting)

    def _end_asides(self) -> None:
        """End what is answered beside the conversation, now or after the present step."""
        for request in [r for r in self._sent if r.aside and not r.is_over]:
            request.stopped.set()
            if request in self._waiting:
                self._waiting.remove(request)
                request.end(End("stopped"))

    @property
    def _refusal(self) -> End | RingError:
        return End("stopped") if self._closed or self.failure is None else self.failure

    def _refuse_waiting(self) -> None:
        with self._changed:
            self._is_over = True
            while self._waiting:
                self._waiting.popleft().end(self._refusal)


_resting: deque[queue.SimpleQueue[Callable[[], object]]] = deque()


def start(work: Callable[[], object]) -> None:
    """Run what uses MLX on a daemon thread, which then rests until it gets other work, and never ends.

    What MLX keeps for a thread is freed when the thread ends, which needs the interpreter: a process that exits meanwhile
    aborts.
    """
    try:
        _resting.pop().put(work)
    except IndexError:
        jobs = queue.SimpleQueue[Callable[[], object]]()
        jobs.put(work)
        threading.Thread(target=_live, args=(jobs,), name="ring-mlx model", daemon=True).start()


def _live(jobs: queue.SimpleQueue[Callable[[], object]]) -> None:
    while True:
        jobs.get()()
        _resting.append(jobs)
