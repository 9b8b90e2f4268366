"""Reads prompts in turns, steps the batch and keeps snapshots: all work with a loaded model."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from ring_mlx.engine import room
from ring_mlx.engine.branches import Prompt, next_turn
from ring_mlx.engine.events import End
from ring_mlx.engine.fairness import ClientTurns
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.metrics import Metrics
from ring_mlx.engine.model_drafts import ModelDrafts
from ring_mlx.engine.pressure import Watch
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.request import Request, as_ring_error
from ring_mlx.engine.row import Row
from ring_mlx.engine.snapshots import SnapshotTree
from ring_mlx.errors import RingError
from ring_mlx.generation.draft_sources import DraftSource, Predicted
from ring_mlx.system.wired import Wired

AHEAD_STEP_TOKENS, ASIDE_STEP_TOKENS, CLEAR_EVERY_STEPS = 256, 64, 256
SHOW_EVERY_S = 0.02  # to count the bytes of all layers' caches takes a part of a short step


class Scheduler:
    """Answers requests, several at once or one after the other; every method must be called on one thread.

    ``reader`` is used in idle time, and by a session's requests, so that each continues from the state after the last.
    """

    def __init__(self, loaded: LoadedModel, metrics: Metrics) -> None:
        self.loaded, self.metrics, self._options = loaded, metrics, loaded.options
        self._tree, self._store, self._batch = loaded.tree(), loaded.store(), loaded.batch()
        if self._store is not None:
            self._tree.save_first = self._store.save_dropped
        self.reader = loaded.reader(self._tree, self._store)
        self._draft_tree = loaded.drafts.tree if isinstance(loaded.drafts, ModelDrafts) else None
        self.pressure, self._wired = Watch(self._tree, self._draft_tree), Wired()
        self._reading: deque[Row] = deque()
        self._rows: dict[int, Row] = {}
        self._paused: deque[Row] = deque()
        self._turns = ClientTurns()
        self._ahead: Callable[[], Prompt | None] | None = None
        self._steps, self._owed_s, self._shown = 0, 0.0, 0.0
        self.show()

    @property
    def busy(self) -> bool:
        return bool(self._reading or self._rows or self._paused)

    def has_room(self, request: Request) -> bool:
        """Whether a request can be admitted: a place is free, and all caches at their likely lengths fit into memory.

        Answers that had to wait for memory go on first.
        """
        rows, o = [*self._reading, *self._rows.values()], self._options
        if self._paused or len(rows) >= o.max_batch or len(self._reading) >= (o.max_reading or o.max_batch):
            return False
        if not rows or request.prepared is None:
            return True
        return self._fits(room.likely(len(request.prepared.prompt.ids), request.prepared.limit))

    def _fits(self, length: int) -> bool:
        """Whether one more sequence fits, besides those in work at their likely lengths."""
        rows = [*self._reading, *self._rows.values()]
        lengths = [length, *(room.likely(len(row.prompt.ids), row.limit, len(row.tokens)) for row in rows)]
        return room.fit(self.loaded.model.config, self._batch.nbytes, self._reading, lengths, self.loaded.draft_config)

    def _make_room(self) -> None:
        """Let the answers that came last wait until those left can grow; what they have is read again when they go on."""
        while len(self._rows) > 1:
            lengths = [room.soon(row) for row in (*self._reading, *self._rows.values())]
            if room.fit(self.loaded.model.config, self._batch.nbytes, self._reading, lengths, self.loaded.draft_config):
                return
            number, row = max(self._rows.items(), key=lambda pair: pair[1].request.arrived)
            row.picker = self._batch.picker(number)
            del self._rows[number]
            self._batch.remove(number)
            self._paused.appendleft(row)

    def _go_on(self) -> None:
        """Let the next answer that waits for memory go on, where there is room."""
        row = self._paused[0]
        if (self._rows or self._reading) and not self._fits(
            room.likely(len(row.prompt.ids), row.limit, len(row.tokens))
        ):
            return
        self._paused.popleft()
        try:
            row.go_on(self._reader_of(row.request))
        except Exception as e:  # noqa: BLE001 one request's failure is not another's
            self._fail(row.request, e, row)
            return
        self._reading.append(row)

    def admit(self, request: Request) -> None:
        """Admit a request; it gets any failure."""
        self._batch.not_timed()
        row, started = None, time.perf_counter()
        request.admitted = started
        self.metrics.observe("queue_seconds", started - request.arrived)
        self._ahead = self._ahead if request.aside else None
        try:
            request.prepared = request.prepared or self.loaded.prepare(request)
            row = Row(request, request.prepared, self.loaded, started)
            row.start(self._reader_of(request))
        except Exception as e:  # noqa: BLE001 one request's failure is not another's
            self._fail(request, e, row)
            return
        self.metrics.count("prompt_tokens_total", len(row.prompt.ids))
        self.metrics.count("cached_tokens_total", row.reused)
        self._reading.append(row)

    def _drafts_of(self, row: Row) -> DraftSource | None:
        """Where the drafts of an answer come from; what is asked beside a conversation is no part of it."""
        request = row.request
        drafts = None if request.aside else self.loaded.drafts
        if isinstance(drafts, ModelDrafts):
            drafts = drafts.at(row.points)
        return Predicted(drafts, request.predicted) if drafts is not None and request.predicted else drafts

    def _reader_of(self, request: Request) -> PromptReader:
        """The reader that goes on from the state after the last request, or one of its own."""
        if request.aside:
            return self.loaded.reader(SnapshotTree(0), None, ASIDE_STEP_TOKENS)
        return self.loaded.reader(self._tree, self._store) if self._options.is_shared else self.reader

    def step(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """One step of one prompt, the prompts taking turns, then one token for every request that generates.

        With both, reading gets half of the time, so that a long prompt slows the others but stops none. Wired memory is
        released when nothing is left to do and ``is_wanted`` says that no request waits.
        """
        self._wired.hold()
        if self._paused and (self._steps % room.LOOK_EVERY_STEPS == 0 or not (self._rows or self._reading)):
            self._go_on()
        began = started = time.perf_counter()
        if self._reading and (not self._rows or self._owed_s <= 0):
            self._read(self._next_to_read())
            self._owed_s = time.perf_counter() - started
            started = time.perf_counter()
        if self._rows:
            self._generate()
            self._owed_s -= time.perf_counter() - started
        self.pressure.look()
        if not self.busy and not is_wanted():
            self._wired.release()
        if not self.busy or began > self._shown + SHOW_EVERY_S:
            self.show()

    def places(self) -> Counter[str]:
        """How many requests of each client are read or answered."""
        return Counter(row.request.client for row in self._all)

    @property
    def _all(self) -> tuple[Row, ...]:
        return *self._reading, *self._rows.values(), *self._paused

    def _next_to_read(self) -> Row:
        """Take the prompt whose turn it is: clients have turns, and of each its prompts."""
        row = min(self._reading, key=lambda row: self._turns.last(row.request.client))
        self._reading.remove(row)
        self._turns.take(row.request.client, (other.request.client for other in self._reading))
        return row

    def drop(self) -> None:
        """Drop requests whose client has left; snapshots of their prompts are kept."""
        for row in [r for r in self._reading if r.request.is_dropped]:
            self._reading.remove(row)
            row.leave_reader()
            self._end(row.request, End("stopped"), "cancelled")
        for number, row in [(n, r) for n, r in self._rows.items() if r.request.is_dropped]:
            self._leave(number)
            self._end(row.request, End("stopped"), "cancelled")
        for row in [r for r in self._paused if r.request.is_dropped]:
            self._paused.remove(row)
            self._end(row.request, End("stopped"), "cancelled")

    def fail_all(self, error: RingError) -> None:
        """Tell every request that it will not be answered."""
        for row in self._all:
            self._end(row.request, error, "failed")
        self._reading.clear()
        self._paused.clear()
        self._rows.clear()

    def use_idle_time(self, wanted: Callable[[], bool]) -> None:
        """Read ahead the start of the latest chat's next turn, then save, unless ``wanted`` turns true.

        Snapshots that must make room for it are saved before.
        """
        try:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and self._options.read_ahead and not wanted():
                self._read_ahead(ahead(), wanted)
            if not wanted():
                self.save()
            self.reader.tell_if_short()
            self.pressure.look()
            self.pressure.tell()
        except Warning:
            raise
        except Exception as e:  # noqa: BLE001 it is not part of an answer
            self.reader.forget()
            warnings.warn(f"{as_ring_error(e)} Answers are not affected.", stacklevel=2)
        finally:
            if not wanted():
                self._wired.release()
            self.show()

    def save(self) -> None:
        """Write durable snapshots to disk; after a failure, which is reported once, nothing more is written."""
        if self._store is None or all(s.saved or not s.durable for s in self._tree):
            return
        error = self.reader.try_to_save()
        if error is not None:
            self._store = None
            warnings.warn(f"{error} Nothing more is saved.", stacklevel=2)

    def release(self) -> None:
        """Release wired memory while nothing is computed."""
        self._wired.release()

    def show(self) -> None:
        """Set the gauges."""
        self._shown = time.perf_counter()
        self.metrics.gauges = {
            "reading": len(self._reading),
            "batch_size": len(self._rows),
            "paused": len(self._paused),
            "batch_bytes": self._batch.nbytes,
            "snapshots": len(self._tree),
            "snapshot_bytes": self._tree.nbytes + (self._draft_tree.nbytes if self._draft_tree else 0),
        }

    @staticmethod
    def free_memory() -> None:
        """Free the memory that MLX keeps for reuse, after the scheduler is gone."""
        gc.collect()
        mx.clear_cache()

    def _read(self, row: Row) -> None:
        self._batch.not_timed()
        has_begun, count = row.known > row.reused, 0
        try:
            # The step after a stop keeps a snapshot of all that was read.
            if not row.is_read and (has_begun or not row.request.stopped.is_set()):
                count = row.read_step()
            self.metrics.count("read_tokens_total", count)
            if row.is_read:
                self._join(row)
            elif count:
                self._reading.append(row)
            else:
                row.leave_reader()
                self._end(row.request, End("stopped"), "cancelled")
        except Exception as e:  # noqa: BLE001 one request's failure is not another's
            self._fail(row.request, e, row)

    def _join(self, row: Row) -> None:
        """Let a prompt that has been read join the batch."""
        text = [*row.prompt.ids, *row.tokens]
        number = self._batch.add(
            text[len(row.ids) :],
            cache=row.reader.live.cache,
            logits=None if self._options.is_shared else row.reader.logits,
            history=text,
            sampler=row.sampler,
            logits_processors=row.processors,
            next_forced=row.next_forced,
            constraint=row.constraint,
            picker=row.picker,
            max_tokens=row.limit - len(row.tokens),
            drafts=self._drafts_of(row),
        )
        row.count(self._batch.counts(number))
        self._rows[number] = row
        if self._options.is_shared:
            row.leave_reader()

    def _generate(self) -> None:
        try:
            tokens = self._batch.step()
        except Exception as e:  # noqa: BLE001 of the batch nothing is certain now
            rows, self._rows, self._batch = self._rows, {}, self.loaded.batch()
            for row in rows.values():
                self._fail(row.request, e, row)
            return
        for number, token in tokens.items():
            self._take(number, token)
        self._steps += 1
        if self._steps % room.LOOK_EVERY_STEPS == 0:
            self._make_room()
        if self._steps % CLEAR_EVERY_STEPS == 0:
            mx.clear_cache()

    def _take(self, number: int, token: int) -> None:
        row = self._rows[number]
        self.metrics.count("generated_tokens_total")
        try:
            self._batch.check(number)
            end = row.take(token, self._batch.logprobs(number))
            waited = time.perf_counter() - row.request.arrived
            if row.request.first_token is None:
                row.request.first_token = row.request.arrived + waited
                self.metrics.observe("time_to_first_token_seconds", waited)
            if end is None:
                return
            self._leave(number)
            self.metrics.observe("request_seconds", waited)
            self._settle(row, end)
        except Exception as e:  # noqa: BLE001 as above
            if number in self._rows:
                self._leave(number)
            self._fail(row.request, e, row)
            return
        self._end(row.request, end, "cancelled" if end.reason == "stopped" else "answered")

    def _settle(self, row: Row, end: End) -> None:
        """Keep the snapshot from which the conversation's next prompt most likely continues."""
        if row.request.aside:
            row.leave_reader()
            return
        if row.renderer is not None and end.message:
            self._ahead = partial(next_turn, row.renderer, row.request.prompt, end.message)
        if self._options.is_shared:
            return
        live = row.reader.live
        live.advance(np.array([*row.prompt.ids, *row.tokens][: int(live.cache.offset)], dtype=np.int32))
        row.reader.logits = None
        generated = live.snapshot("generated", durable=False)
        if self._ahead is None:
            row.reader.settle(generated.tokens.tolist(), generated)
            return
        ahead = self._ahead()
        self._ahead = None if ahead is None else lambda: ahead
        row.reader.settle(None if ahead is None else ahead.ids, generated, is_open=end.reason != "stop")

    def _leave(self, number: int) -> None:
        for name, count in vars(self._rows.pop(number).counts).items():
            self.metrics.count(f"{name}_tokens_total", count)
        self._batch.remove(number)

    def _read_ahead(self, prompt: Prompt | None, wanted: Callable[[], bool]) -> None:
        if prompt is None or len(prompt.ids) >= self.loaded.model.config.context_tokens or wanted():
            return
        self._wired.hold()
        known = self.reader.start(prompt.ids)
        if known < len(prompt.ids):
            for done in self.reader.read(prompt.ids, {len(prompt.ids): "user"}, wanted, AHEAD_STEP_TOKENS):
                self.metrics.count("read_tokens_total", done - known)
                self.metrics.count("ahead_tokens_total", done - known)
                known = done
                self.pressure.look()
        self.reader.settle(prompt.ids)
        if self._options.is_shared:
            self.reader.forget()

    def _fail(self, request: Request, e: Exception, row: Row | None) -> None:
        """Report a failure, and drop the live cache, whose content is then uncertain; snapshots are values and stay."""
        if row is not None:
            row.leave_reader()
            if not (self._options.is_shared or request.aside):
                self.reader.forget()
        self._end(request, as_ring_error(e), "failed")

    def _end(self, request: Request, last: End | RingError, how: str) -> None:
        self.metrics.count("requests_finished_total", reason=how)
        if not request.is_dropped:
            self.show()
        request.end(last)
