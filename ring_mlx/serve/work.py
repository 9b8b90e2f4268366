"""The work of the model's thread: reads prompts in turns, steps the batch, keeps snapshots."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ring_mlx.engine.branches import next_turn
from ring_mlx.engine.reading import Reader
from ring_mlx.errors import ModelError, RingError
from ring_mlx.serve.failures import ApiError, bad
from ring_mlx.serve.job import Job
from ring_mlx.serve.metrics import Metrics
from ring_mlx.serve.parts import Parts
from ring_mlx.serve.reading import Reading
from ring_mlx.serve.row import Row
from ring_mlx.system import memory
from ring_mlx.system.pressure import Watch
from ring_mlx.system.terminal_text import note
from ring_mlx.system.wired import Wired

AHEAD_STEP_TOKENS, CLEAR_EVERY_STEPS = 256, 256


class Work:
    """A loaded model with the requests in it; every method must be called on one thread.

    Args:
        parts: What it works with.
        metrics: Where to count.
    """

    def __init__(self, parts: Parts, metrics: Metrics) -> None:
        self._parts, self._metrics = parts, metrics
        self._model, self._tokenizer, self._settings = parts.model, parts.tokenizer, parts.settings
        self._tree, self._store, self._batch = parts.tree(), parts.store(), parts.batch()
        self._idle = self._reader()
        self.pressure, self._wired = Watch(self._tree), Wired()
        self._reading: deque[Reading] = deque()
        self._rows: dict[int, Row] = {}
        self._ahead: tuple[Job, Mapping[str, Any]] | None = None
        self._steps, self._owed_s = 0, 0.0

    @property
    def busy(self) -> bool:
        """Whether there is a request."""
        return bool(self._reading or self._rows)

    def has_room(self, job: Job) -> bool:
        """Whether a request can come in: a place is free, and all caches at their longest fit into memory."""
        jobs = [*(r.job for r in self._reading), *(r.job for r in self._rows.values())]
        s = self._settings
        if len(jobs) >= s.max_batch or len(self._reading) >= (s.max_reading or s.max_batch):
            return False
        longest = max([job.most_tokens, *(j.most_tokens for j in jobs)])
        needed = (len(jobs) + 1) * memory.cache_bytes(self._model.config, longest)
        held = mx.get_active_memory() - self._batch.nbytes
        return not jobs or held + needed <= memory.budget_bytes()

    def admit(self, job: Job) -> None:
        """Take in a request; a failure is told to it."""
        self._ahead = None
        try:
            reading = Reading(job, self._reader())
        except Exception as e:  # noqa: BLE001 one request's failure is not another's
            self._fail(job, e)
            return
        self._metrics.count("prompt_tokens_total", len(job.prompt.ids))
        self._metrics.count("cached_tokens_total", reading.cached)
        self._reading.append(reading)

    def step(self) -> None:
        """One step of one prompt, the prompts taking turns, then one token for every request that generates.

        Where there is both, reading gets half of the time: a long prompt slows the others down, and stops nobody.
        """
        self._wired.hold()
        self.pressure.look()
        started = time.perf_counter()
        if self._reading and (not self._rows or self._owed_s <= 0):
            self._read(self._reading.popleft())
            self._owed_s = time.perf_counter() - started
            started = time.perf_counter()
        if self._rows:
            self._generate()
            self._owed_s -= time.perf_counter() - started

    def drop_cancelled(self) -> None:
        """Let those go whose answer nobody wants any more; what was read of their prompts is kept."""
        for reading in [r for r in self._reading if r.job.cancelled.is_set()]:
            self._reading.remove(reading)
            reading.settle()
            self._finished("cancelled")
        for number in [n for n, row in self._rows.items() if row.job.cancelled.is_set()]:
            self._leave(number)
            self._finished("cancelled")

    def fail_all(self, error: ApiError) -> None:
        """Tell every request that it will not be answered."""
        for job in [*(r.job for r in self._reading), *(r.job for r in self._rows.values())]:
            self._fail(job, error)
        self._reading.clear()
        self._rows.clear()
        self._wired.release()

    def use_idle_time(self, wanted: Callable[[], bool]) -> None:
        """Read what the next turn of the latest chat starts with, then save, unless ``wanted`` turns true."""
        try:
            if self._tree.is_full and not wanted():
                self.save()
            ahead, self._ahead = self._ahead, None
            if ahead is not None and self._settings.read_ahead and not wanted():
                self._read_ahead(*ahead, wanted)
            if not wanted():
                self.save()
            self._idle.tell_if_short()
            self.pressure.look()
            self.pressure.tell()
        except Exception as e:  # noqa: BLE001 nobody waits for this
            self._idle = self._reader()
            warnings.warn(f"[serve] {type(e).__name__}: {str(e)[:200]}; answers are not affected.", stacklevel=2)
        finally:
            if not wanted():
                self._wired.release()

    def save(self) -> None:
        """Write to disk what is worth it; a disk that cannot be written is named once and then left alone."""
        if self._store is None or all(s.saved or not s.durable for s in self._tree):
            return
        error = self._idle.try_to_save()
        if error is not None:
            self._store = None
            warnings.warn(f"{error} Nothing more is saved.", stacklevel=2)

    def gauges(self) -> dict[str, float]:
        """How much there is."""
        return {
            "reading": len(self._reading),
            "batch_size": len(self._rows),
            "batch_bytes": self._batch.nbytes,
            "snapshots": len(self._tree),
            "snapshot_bytes": self._tree.nbytes,
        }

    @staticmethod
    def free_memory() -> None:
        """Give back what MLX keeps for reuse, once the work itself is gone."""
        gc.collect()
        mx.clear_cache()

    def _reader(self) -> Reader:
        return self._parts.reader(self._tree, self._store)

    def _read(self, reading: Reading) -> None:
        try:
            if not reading.done:
                reading.step()
            if not reading.done:
                self._reading.append(reading)
                return
            reading.settle()
            job = reading.job
            row = Row(job, reading.cached, self._tokenizer, self._model.config.vocab_size, self._settings.thinking)
            number = self._batch.add(
                job.prompt.ids[-1:], cache=reading.cache, sampler=row.choose, logits_processors=row.processors
            )
            self._rows[number] = row
        except Exception as e:  # noqa: BLE001 one request's failure is not another's
            self._fail(reading.job, e)

    def _generate(self) -> None:
        try:
            tokens = self._batch.step()
        except Exception as e:  # noqa: BLE001 of the batch nothing is certain now
            for row in self._rows.values():
                self._fail(row.job, e)
            self._rows, self._batch = {}, self._parts.batch()
            return
        for number, token in tokens.items():
            self._take(number, token)
        self._steps += 1
        if self._steps % CLEAR_EVERY_STEPS == 0:
            mx.clear_cache()

    def _take(self, number: int, token: int) -> None:
        row = self._rows[number]
        first = row.generated == 0
        self._metrics.count("generated_tokens_total")
        try:
            self._batch.check(number)
            last = row.take(token)
        except Exception as e:  # noqa: BLE001 as above
            self._leave(number)
            self._fail(row.job, e)
            return
        waited = time.perf_counter() - row.job.arrived
        if first:
            self._metrics.observe("time_to_first_token_seconds", waited)
        if not last:
            return
        self._leave(number)
        self._metrics.observe("request_seconds", waited)
        self._finished("answered")
        message = row.message() if row.job.renderer else None
        self._ahead = (row.job, message) if message is not None else None

    def _leave(self, number: int) -> None:
        del self._rows[number]
        self._batch.remove(number)

    def _read_ahead(self, job: Job, message: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
        assert job.renderer is not None
        prompt = next_turn(job.renderer, job.asked.prompt, message)  # type: ignore[arg-type]
        if prompt is None or len(prompt.ids) >= self._model.config.context_tokens or wanted():
            return
        if self._idle.start(prompt.ids) < len(prompt.ids):
            for _ in self._idle.read(prompt.ids, {len(prompt.ids): "user"}, wanted, AHEAD_STEP_TOKENS):
                pass
        self._idle.settle(prompt.ids)
        self._idle.forget()

    def _fail(self, job: Job, e: Exception) -> None:
        self._finished("failed")
        if isinstance(e, ApiError):
            job.events.put(e)
        elif isinstance(e, RingError):
            is_ours = isinstance(e, ModelError)
            job.events.put(ApiError(500, str(e), code="model_error") if is_ours else bad(str(e)))
        else:
            note("".join(traceback.format_exception(e)))
            text = f"the model failed ({type(e).__name__}); see the server's log."
            job.events.put(ApiError(500, text, code="internal_error"))

    def _finished(self, reason: str) -> None:
        self._metrics.count("requests_finished_total", reason=reason)
