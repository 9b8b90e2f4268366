"""The models of a server: loaded when they are asked for, and let go when memory or time wants it.

A model in use is never let go. Where one must wait for the memory of others, new requests for those wait too, so that each
model has its turn, and a turn answers all requests that wait for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.errors import NoFitError, SessionError
from ring_mlx.model import memory
from ring_mlx.serve.engine import Engine, Settings
from ring_mlx.serve.failures import ApiError, GoneError, busy
from ring_mlx.system.terminal_text import note

if TYPE_CHECKING:
    from ring_mlx.engine.events import SessionOptions
    from ring_mlx.engine.model_thread import Load
    from ring_mlx.model.config import RingConfig

POLL_S, CLOSE_S = 0.05, 30.0
ANY = "*"


class Served:
    """A model that clients may ask for.

    Attributes:
        engine: While it is in memory, or on its way there.
        users: Requests that are being answered with it.
        waiting: Requests that wait for it.
        leaving: It will be let go when nobody uses it; new requests wait until it is loaded again.
        claimed: It has got its memory, and the requests that waited for it then are not all being answered yet.
        used: When it was used last (``time.monotonic``).
    """

    def __init__(self, settings: Settings, context_tokens: int | None = None) -> None:
        self.settings, self.name, self._context = settings, settings.name, context_tokens
        self.engine: Engine | None = None
        self.users = self.waiting = 0
        self.leaving = self.claimed = False
        self.used = time.monotonic()

    @property
    def state(self) -> str:
        """``unloaded``, or as `ModelThread.state`."""
        engine = self.engine
        return "unloaded" if engine is None or engine.is_closed else engine.state

    @property
    def is_coming(self) -> bool:
        """Whether it takes memory, and those for whom it was loaded have not had it yet."""
        return self.claimed and (self.state == "loading" or (self.state == "ok" and self.waiting > 0))

    @property
    def context_tokens(self) -> int | None:
        """Its context, as far as it is known before it is loaded."""
        found = self.engine.context_tokens if self.engine is not None else None
        return self._context if found is None else found


class Models:
    """All models of a server.

    Args:
        served: Each with a name of its own; the first answers requests that name none.
        metrics: Their counters.
        aliases: Further names, each for one of the models; ``*`` stands for all names that are none.
        keep_s: A model that nobody used for so long is let go; None keeps it. A single model without it is loaded now,
            and requests do not wait for it.
        load: As for `Engine`, of a single model.
    """

    def __init__(
        self,
        served: Sequence[Served],
        metrics: Metrics,
        aliases: Mapping[str, str] | None = None,
        keep_s: float | None = None,
        load: Load | None = None,
    ) -> None:
        self.all = {one.name: one for one in served}
        self.first, self.aliases, self._keep_s = served[0], dict(aliases or {}), keep_s
        self._metrics = metrics
        self._changed = threading.Condition()
        self._loads: deque[Served] = deque()
        self._closed, self._drains_since = False, 0.0
        self.is_single = len(served) == 1 and keep_s is None
        if self.is_single:
            self.first.engine = Engine(self.first.settings, metrics, load)

    def find(self, name: str | None) -> Served:
        """The model that a name stands for. Raises ApiError 404."""
        one = self.first if not name else self.all.get(name) or self.all.get(self._alias_of(name))
        if one is None:
            known = ", ".join(map(repr, self.names[:20]))
            here = f"this is {known}" if len(self.names) == 1 else f"here are {known}"
            raise ApiError(404, f"no model {str(name)[:100]!r} here; {here}.", "model", "model_not_found")
        return one

    def shown(self, name: str | None, one: Served) -> str:
        """What an answer calls its model: as the client does, if that is a name of ours."""
        return name if name and name in self.aliases else one.name

    @property
    def names(self) -> list[str]:
        """All names that clients may use, without ``*``."""
        return [*self.all, *(alias for alias in self.aliases if alias != ANY)]

    @property
    def state(self) -> str:
        """``closed`` or ``draining``; else of a single model its own state, and ``ok`` of several."""
        engine = self.first.engine
        if self._drains_since and not self._closed:
            return "draining"
        return engine.state if self.is_single and engine is not None else "closed" if self._closed else "ok"

    def check(self, client: str) -> None:
        """Before a body is read. Raises ApiError 503 if the server is ending, or a single model is not ready for more."""
        if self._closed or self._drains_since:
            raise busy("the server is ending; try again when it is back.", 10)
        if self.is_single and self.first.engine is not None:
            self.first.engine.check(client)

    def drained(self, most_s: float) -> bool:
        """Take no new requests; returns whether none is left, or so many seconds have passed since the first call."""
        self._drains_since = self._drains_since or time.monotonic()
        return self.is_idle or 0 <= most_s < time.monotonic() - self._drains_since

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered or waits for its model."""
        return not any(one.users or one.waiting for one in self.all.values())

    def is_ready(self, one: Served) -> bool:
        """Whether a model can be used at once, or its engine says what is wrong."""
        return self.is_single or (not one.leaving and one.state == "ok")

    @contextmanager
    def use(self, one: Served, gone: Callable[[], bool]) -> Iterator[Engine]:
        """The engine of a model, which stays loaded meanwhile; it is loaded before if need be.

        Raises ApiError if it cannot be loaded, or too many wait; GoneError if the client leaves while it waits.
        """
        engine = self._take(one, gone)
        try:
            yield engine
        finally:
            with self._changed:
                one.users -= 1
                one.used = time.monotonic()
                self._changed.notify_all()

    def let_go_idle(self) -> None:
        """Let models go that nobody used for long; called now and then, and returns at once."""
        if self.is_single:
            return
        with self._changed:
            before = -math.inf if self._keep_s is None else time.monotonic() - self._keep_s
            for one in self.all.values():
                if one.state == "ok" and not one.users and not one.waiting and one.used <= before:
                    self._let_go(one)
                self._forget(one)

    def gauges(self) -> dict[str, float]:
        """Present numbers of all models together."""
        engines = [
            one.engine for one in self.all.values() if one.engine is not None and (self.is_single or one.engine.loaded)
        ]
        total: dict[str, float] = {"models_loaded": sum(engine.loaded is not None for engine in engines)}
        for engine in engines:
            for name, value in engine.gauges().items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End running answers, save snapshots, free all models; returns whether all their threads are at rest."""
        with self._changed:
            self._closed = True
            engines = [one.engine for one in self.all.values() if one.engine is not None]
            self._changed.notify_all()
        until = time.monotonic() + timeout_s
        for engine in engines:
            engine.close(0)
        return all(engine.close(max(0.0, until - time.monotonic())) for engine in engines)

    def _alias_of(self, name: str) -> str:
        return self.aliases.get(name) or self.aliases.get(ANY, "")

    def _take(self, one: Served, gone: Callable[[], bool]) -> Engine:
        with self._changed:
            if sum(other.waiting for other in self.all.values()) >= one.settings.max_queue:
                raise busy(f"{one.settings.max_queue} requests wait for their models already; try again.")
            if not self.is_single and one.engine is not None and one.engine.failure is not None:
                one.engine = None  # what failed before may work now
            one.waiting += 1
            try:
                while not self.is_ready(one):
                    self._check(one)
                    self._changed.wait(POLL_S)
                    if gone():
                        raise GoneError
                one.users += 1
                one.claimed = one.waiting > 1
            finally:
                one.waiting -= 1
            assert one.engine is not None
            return one.engine

    def _check(self, one: Served) -> None:
        """Begin to load a model unless that is under way. Raises ApiError if it has failed."""
        if self._closed:
            raise busy("the server is closing.")
        self._forget(one)
        if one.engine is None:
            one.claimed = False
            one.engine = Engine(one.settings, self._metrics.of_one_model(), partial(self._loaded, one))
        elif (error := one.engine.failure) is not None:
            text = f"the model {one.name!r} cannot be loaded: {error}"
            if isinstance(error, NoFitError):
                raise ApiError(400, text, "model", "model_does_not_fit")
            raise ApiError(500, text, "model", "model_not_loaded")

    def _loaded(self, one: Served, options: SessionOptions, progress: Callable[..., object]) -> LoadedModel:
        """Load a model, on its own thread, when no other is being loaded and there is room."""
        try:
            with self._changed:
                self._loads.append(one)
                while self._loads[0] is not one:
                    self._changed.wait(POLL_S)
                    self._check_wanted(one)
            loaded = LoadedModel.load(options, progress, partial(self._claim, one))
            self._metrics.count("model_loads_total", model=one.name)
            return loaded
        except Exception as e:
            if not isinstance(e, SessionError):
                note(f"[serve] {one.name} cannot be loaded: {e}")
            raise
        finally:
            with self._changed:
                self._loads.remove(one)
                self._unmark()
                one.used = time.monotonic()
                self._changed.notify_all()

    def _check_wanted(self, one: Served) -> None:
        """Give a load up that nobody waits for, or when all ends. Raises SessionError."""
        if self._closed:
            raise SessionError("the server is closing; start it again.")
        if not one.waiting:
            one.engine = None
            raise SessionError("nobody waits for the model any more; ask again.")

    def _claim(self, one: Served, config: RingConfig, needed_bytes: int, name: str, beside_bytes: int = 0) -> None:
        """Let others go, those used least recently first, until there is room for a model.

        Raises NoFitError if it does not even fit alone; SessionError as `_check_wanted`.
        """
        memory.check_fit(config, needed_bytes, name, None, beside_bytes)
        with self._changed:
            while self._make_room(one, needed_bytes + memory.extra_bytes(config)):
                self._changed.wait(POLL_S)
                self._check_wanted(one)
            one.claimed = True
        memory.claim(config, needed_bytes, name, beside_bytes)

    def _make_room(self, one: Served, needed_bytes: int) -> bool:
        """Let go what nobody uses and mark what is in use, as far as memory is missing; returns whether to look again."""
        self._unmark()
        missing = memory.active_bytes() + needed_bytes - memory.budget_bytes()
        if missing <= 0:
            return False
        others = [other for other in self.all.values() if other is not one and other.engine is not None]
        for other in sorted(others, key=lambda other: (other.users > 0, other.used)):
            if missing > 0 and other.state == "ok" and not other.is_coming:
                assert other.engine is not None
                missing -= other.engine.held_bytes
                other.leaving = True
                if not other.users:
                    self._let_go(other)
            self._forget(other)
        return any(other.engine is not None and (other.leaving or other.is_coming) for other in others)

    def _unmark(self) -> None:
        for other in self.all.values():
            other.leaving = other.engine is not None and other.engine.is_closed

    def _let_go(self, one: Served) -> None:
        """Begin to free a model that nobody uses; its thread saves its snapshots."""
        assert one.engine is not None
        one.engine.close(0)

    @staticmethod
    def _forget(one: Served) -> None:
        """Forget an engine that was let go and is at rest, so that the model may be loaded again."""
        if one.engine is not None and one.engine.is_closed and one.engine.close(0):
            one.engine, one.leaving = None, False
