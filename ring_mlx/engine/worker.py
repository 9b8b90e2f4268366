"""What the session's thread does: loads, answers one request at a time, and uses the time between; owns MLX."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.loading import load
from ring_mlx.engine.branches import Prompt, Renderer, branch_points, next_turn
from ring_mlx.engine.events import (
    Counters,
    End,
    Event,
    Loading,
    ModelInfo,
    PrefillProgress,
    Reason,
    Request,
    SessionOptions,
    Statistics,
)
from ring_mlx.engine.reading import Reader
from ring_mlx.engine.snapshots import Snapshot, SnapshotTree, Store
from ring_mlx.engine.snapshots.store import open_store
from ring_mlx.errors import OptionError
from ring_mlx.generation.decoding import LogitsProcessor, Sampler, decode
from ring_mlx.generation.sampling import start_sampling
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.speech import Speech
from ring_mlx.generation.stream import GenerationEvent, check_lengths, encode_prompt, events_of, thought_closer
from ring_mlx.generation.thinking import splitter_after
from ring_mlx.model.model import Model
from ring_mlx.system import memory
from ring_mlx.system.pressure import Watch
from ring_mlx.system.wired import Wired

AHEAD_STEP_TOKENS = 256
Emit = Callable[[Event], None]


@dataclass
class _Turn:
    """What is known of one request while it is answered."""

    request: Request
    renderer: Renderer | None
    prompt: Prompt
    started: float
    limit: int
    sampler: Sampler
    processors: Sequence[LogitsProcessor]
    seed: int
    reused: int = 0
    generated: Snapshot | None = None
    end: End | None = None


class Worker:
    """A loaded model and all that it remembers; every method must be called on one thread.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        name: What to call it.
        options: The session's.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper, name: str, options: SessionOptions) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        kv = options.kv_quantization
        if kv is not None:
            kv.check(model.config.head_dim)
        kv_words = f"{kv.bits} bits, groups of {kv.group_size}" if kv else "none"
        self.info = ModelInfo(
            name=name,
            context_tokens=model.config.context_tokens,
            quantization=_quantization(model),
            kv_quantization=kv_words,
            has_chat_template=bool(tokenizer.has_chat_template),
            fingerprint=model.fingerprint,
            memory_limit_bytes=memory.budget_bytes(),
            sampling=model.sampling,
        )
        budget = memory.snapshot_budget_bytes() if options.memory_budget_bytes is None else options.memory_budget_bytes
        self.reader = Reader(
            model,
            SnapshotTree(budget),
            _open_store(options, model),
            step_tokens=options.prefill_step_tokens,
            every_tokens=options.snapshot_every_tokens,
            kv_quantization=kv,
        )
        self.pressure = Watch(self.reader.tree)
        self._tps: float | None = None
        self._ahead: list[int] | None = None
        self._reused = self._generated = self._ahead_tokens = 0

    @classmethod
    def load(cls, options: SessionOptions, emit: Emit) -> Worker:
        """Load the model part by part, telling how far it is.

        Raises:
            RingError: As `ring_mlx.load`.
        """
        name = Path(options.model).name
        emit(Loading(name, 0, 0))
        model, tokenizer = load(
            options.model,
            **options.loading,
            progress=lambda done, total, *_: emit(Loading(name, int(done), int(total))),
        )
        return cls(model, tokenizer, name, options)

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        tree, read = self.reader.tree, self.reader.read_tokens
        return Counters(read, self._ahead_tokens, self._reused, self._generated, len(tree), tree.nbytes)

    def answer(self, request: Request, emit: Emit) -> None:
        """Answer a request in events, `End` the last.

        Raises:
            RingError: If the request cannot be met; what is remembered stays as it was.
        """
        self._ahead = None
        turn = self._begin(request)
        with Wired():
            try:
                read = self._read(turn, emit)
                emit(self._generate(turn, emit) if read else End("stopped"))
            except BaseException:
                self.forget_live()
                raise
            finally:
                self._settle(turn)

    def use_idle_time(self, wanted: Callable[[], bool]) -> None:
        """Read what every next prompt starts with, then save, unless ``wanted`` turns true.

        What has to make room for that is saved before.
        """
        if self.reader.tree.is_full and not wanted():
            self.save()
        ids, self._ahead = self._ahead, None
        if ids is not None and self._options.read_ahead and len(ids) < self.info.context_tokens and not wanted():
            self._read_ahead(ids, wanted)
        if not wanted():
            self.save()
        self.reader.tell_if_short()
        self.pressure.tell()

    def _read_ahead(self, ids: list[int], wanted: Callable[[], bool]) -> None:
        before = self.reader.read_tokens
        with Wired():
            if self.reader.start(ids) < len(ids):
                for _ in self.reader.read(ids, {len(ids): "user"}, wanted, AHEAD_STEP_TOKENS):
                    self.pressure.look()
            self.reader.settle(ids)
        self._ahead_tokens += self.reader.read_tokens - before

    def save(self) -> None:
        """Write to disk what is worth it; a disk that cannot be written is named once and then left alone."""
        error = self.reader.try_to_save()
        if error is not None:
            warnings.warn(f"{error} Nothing more is saved.", stacklevel=2)

    @staticmethod
    def free_memory() -> None:
        """Give back what MLX keeps for reuse, once the worker itself is gone."""
        gc.collect()
        mx.clear_cache()

    def forget_live(self) -> None:
        """Drop the live cache, of which nothing is certain after a failure; snapshots are values and stay."""
        self.reader.forget()

    def _begin(self, request: Request) -> _Turn:
        started, renderer = time.perf_counter(), None
        if isinstance(request.prompt, str):
            for name in ("template_options", "continue_last"):
                if getattr(request, name):
                    raise OptionError(f"{name} needs the chat template, but the prompt is text; give messages.")
            prompt = Prompt(request.prompt, encode_prompt(self._tokenizer, request.prompt), None)
        else:
            renderer = Renderer(self._tokenizer, request.tools, request.template_options, request.continue_last)
            prompt = renderer.prompt(request.prompt)
        count = len(prompt.ids)
        check_lengths(
            self._model, count, 0, request.max_tokens, self._options.prefill_step_tokens, request.thinking_budget
        )
        vocabulary = self._model.config.vocab_size
        sampling = start_sampling(request.sampling, vocabulary, self._tokenizer, self._model.sampling)
        limit = within(request.max_tokens, self.info.context_tokens - count + 1)
        return _Turn(request, renderer, prompt, started, limit, *sampling)

    def _read(self, turn: _Turn, emit: Emit) -> bool:
        """Whether the prompt was read to its end."""
        ids, stopped = turn.prompt.ids, turn.request.stopped.is_set
        turn.reused = known = self.reader.start(ids)
        self._reused += known
        emit(PrefillProgress(known, len(ids), known, self._eta(len(ids) - known)))
        if known == len(ids):
            return True
        if stopped():
            return False
        points: Mapping[int, str] = {}
        if turn.renderer is not None and not isinstance(turn.request.prompt, str):
            points = branch_points(turn.renderer, turn.request.prompt, turn.prompt, known)
        began = time.perf_counter()
        for done in self.reader.read(ids, points, stopped):
            self._tps = (done - known) / max(time.perf_counter() - began, 1e-9)
            emit(PrefillProgress(done, len(ids), known, self._eta(len(ids) - done)))
            self.pressure.look()
        return len(self.reader.live.tokens) == len(ids)

    def _generate(self, turn: _Turn, emit: Emit) -> End:
        request, reader = turn.request, self.reader
        talk = None if isinstance(request.prompt, str) else request.prompt
        speech = Speech(talk[-1] if talk and request.continue_last else None, bool(request.tools))
        reason: Reason = "stopped"
        for e in self._tokens(turn):
            for event in speech.add(e):
                emit(event)
            reason = cast(Reason, e.finish_reason) or reason
            self.pressure.look()
        self._generated += len(speech.tokens)
        fed = [*turn.prompt.ids, *speech.tokens][: int(reader.live.cache.offset)]
        reader.live.advance(np.array(fed, dtype=np.int32))
        reader.logits = None
        turn.generated = reader.live.snapshot("generated", durable=False)
        emit(self._statistics(turn, speech))
        turn.end = End(reason, speech.message())
        return turn.end

    def _settle(self, turn: _Turn) -> None:
        """Keep what the next prompt of the conversation is likeliest to go on from."""
        end, generated = turn.end, turn.generated
        if end is None or generated is None:
            self.reader.settle()
        elif turn.renderer is None or isinstance(turn.request.prompt, str):
            self.reader.settle(generated.tokens.tolist(), generated)
        else:
            prompt = next_turn(turn.renderer, turn.request.prompt, end.message)
            self._ahead = prompt.ids if prompt is not None else None
            self.reader.settle(self._ahead, generated, is_open=end.reason != "stop")

    def _tokens(self, turn: _Turn) -> Iterator[GenerationEvent]:
        request, reader, ids = turn.request, self.reader, turn.prompt.ids
        thinking, knows_tags = self._options.thinking, turn.renderer is not None and self._tokenizer.has_thinking
        splitter = splitter_after(turn.prompt.text, thinking.start, knows_tags)
        assert reader.logits is not None
        steps = decode(
            reader.logits,
            self._model,
            reader.live.cache,
            mx.array(ids, dtype=mx.int32),
            max_tokens=turn.limit,
            sampler=turn.sampler,
            logits_processors=turn.processors,
            kv_quantization=reader.kv_quantization,
            next_forced=thought_closer(self._tokenizer, splitter, request.thinking_budget, thinking, turn.limit),
        )
        return events_of(
            steps,
            self._tokenizer,
            splitter,
            turn.limit,
            prompt_tokens=len(ids) - turn.reused,
            cached_tokens=turn.reused,
            before=ids,
            started=turn.started,
            stopped=request.stopped.is_set,
        )

    def _statistics(self, turn: _Turn, speech: Speech) -> Statistics:
        last = speech.last
        return Statistics(
            prompt_tokens=len(turn.prompt.ids),
            read_tokens=last.prompt_tokens,
            reused_tokens=last.cached_tokens,
            prompt_tps=last.prompt_tps,
            time_to_first_token_s=last.time_to_first_token_s,
            generated_tokens=last.generation_tokens,
            thinking_tokens=speech.thinking_tokens,
            generation_tps=last.generation_tps,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=turn.seed,
            quantization=self.info.quantization,
            kv_quantization=self.info.kv_quantization,
        )

    def _eta(self, tokens: int) -> float | None:
        return 0.0 if tokens == 0 else tokens / self._tps if self._tps else None


def _open_store(options: SessionOptions, model: Model) -> Store | None:
    kv = options.kv_quantization
    form = f"-kv{kv.bits}x{kv.group_size}from{kv.start}" if kv else ""
    form += f"-disk{options.store_kv_bits}" if options.store_kv_bits else ""
    return open_store(options, model, form, options.store_kv_bits)


def _quantization(model: Model) -> str:
    found = {(m.bits, m.group_size) for m in model.modules() if hasattr(m, "bits")}
    if not found:
        return f"none ({str(model.model.norm.weight.dtype).rpartition('.')[2]})"
    return ", ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(found))
