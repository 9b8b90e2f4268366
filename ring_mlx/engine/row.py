"""One request in work: its prompt is read a step at a time, then each token becomes events."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.vocabulary import TextOffsets, token_bytes
from ring_mlx.engine.branches import Prepared, branch_points
from ring_mlx.engine.events import (
    AnswerText,
    End,
    Event,
    PrefillProgress,
    Reason,
    Revised,
    Statistics,
    ThinkingText,
    TokenLogprob,
    ToolCall,
)
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.request import Request
from ring_mlx.generation.decoding import LogitsProcessor, Picker, check_finite, largest_logit
from ring_mlx.generation.drafts import Counts
from ring_mlx.generation.message import MessageBuilder, StopText
from ring_mlx.generation.sampling import start_sampling, without
from ring_mlx.generation.stream import GenerationEvent, events_of, thought_closer
from ring_mlx.generation.thinking import Thinking

# Prompt tokens a step where their logits are kept: of 157,184 floats each.
SCORED_TOKENS = 128


class Row:
    """A request that is being answered, work on which began at ``started`` (``time.perf_counter``).

    Raises OptionError if the sampling cannot work with the vocabulary.
    """

    def __init__(self, request: Request, prepared: Prepared, loaded: LoadedModel, started: float = 0.0) -> None:
        tokenizer, thinking, config = loaded.tokenizer, loaded.options.thinking, loaded.model.config
        self.request, self.prompt, self.renderer = request, prepared.prompt, prepared.renderer
        self.limit, self._started, self._tokenizer, self._info = prepared.limit, started, tokenizer, loaded.info
        # A server's row joins the batch with the last token of its prompt, a session's with the logits after it.
        self.ids = self.prompt.ids[:-1] if loaded.options.is_shared else self.prompt.ids
        self.sampler, self.processors, self._seed = start_sampling(
            request.sampling, config.vocab_size, tokenizer, loaded.model.sampling
        )
        self.processors += _ends_held_back(request, tokenizer, config.vocab_size, len(self.prompt.ids))
        self._splitter, self.constraint = loaded.splitter(request, prepared.prompt), prepared.constraint
        room = Thinking(answer_room=0) if request.is_text else thinking
        self.next_forced = thought_closer(tokenizer, self._splitter, request.thinking_budget, room, self.limit)
        is_chat = not (request.is_text or isinstance(request.prompt, str))
        before = request.prompt[-1] if is_chat and request.continue_last else None
        self._builder = MessageBuilder(before, bool(request.tools), request.one_call)
        self._stops = StopText(request.stop)
        self._thought_logprobs: list[TokenLogprob] = []
        self._offsets = TextOffsets()
        self.tokens: list[int] = []
        self._token: tuple[int, mx.array] | None = None
        self.reused = self.known = 0
        self.points: dict[int, str] = {}  # of the prompt, where others may go on
        self.counts = Counts()
        self.picker: Picker | None = None  # of a row that waits within its answer
        self._steps: Iterator[int] = iter(())
        self._events: Iterator[GenerationEvent] = self._make_events()

    # The prompt

    @property
    def is_read(self) -> bool:
        """Whether the row can generate."""
        return self.known == len(self.ids)

    def start(self, reader: PromptReader) -> None:
        """Go to the deepest snapshot of the prompt."""
        self.reader = reader
        if self.request.prompt_logprobs:
            reader.forget()
            self._tell_token(self.prompt.ids[0], None)
        else:
            self.reused = self.known = reader.start(self.ids)
        self._steps = self._read()
        self._tell_progress()

    def go_on(self, reader: PromptReader) -> None:
        """Read again what the row had before it had to wait, as far as no snapshot has it."""
        self.reader, self.ids = reader, [*self.prompt.ids, *self.tokens][:-1]
        self.known = reader.start(self.ids)
        self._steps = reader.read(self.ids, {}, self.request.stopped.is_set)

    def count(self, counts: Counts) -> None:
        """Count drafts there from now on, besides those so far."""
        counts.drafted += self.counts.drafted
        counts.accepted += self.counts.accepted
        self.counts = counts

    def read_step(self) -> int:
        """Read a step of the prompt; returns how many tokens it had."""
        before = self.known
        self.known = next(self._steps, before)
        self._tell_progress()
        return self.known - before

    def leave_reader(self) -> None:
        """Let go of the reader, whose cache is the batch's now or needed no more; snapshots of this prompt only may go."""
        if hasattr(self, "reader"):
            self.reader.settle()
            del self.reader
            self._steps = iter(())  # a generator of this row would hold it until the garbage is collected

    def _read(self) -> Iterator[int]:
        points: dict[int, str] = {}
        if self.renderer is not None and not self.request.aside:
            points = branch_points(self.renderer, self.request.prompt, self.prompt, self.known)
            points = {min(at, len(self.ids)): kind for at, kind in points.items()}
            self.points = points
        began = time.perf_counter()
        told = (SCORED_TOKENS, self._tell_prompt) if self.request.prompt_logprobs else ()
        for known in self.reader.read(self.ids, points, self.request.stopped.is_set, *told):
            self.reader.tps = (known - self.reused) / max(time.perf_counter() - began, 1e-9)
            yield known

    def _tell_progress(self) -> None:
        left, tps = len(self.ids) - self.known, self.reader.tps
        eta_s = 0.0 if left == 0 else left / tps if tps else None
        self.request.events.put(PrefillProgress(self.known, len(self.ids), self.reused, eta_s))

    # The answer

    def take(self, token: int, logprobs: mx.array) -> End | None:
        """Tell what a token adds; returns the end, which is still to be told, where it was the last.

        Raises GrammarError if the answer cannot go on in its form.
        """
        if self.constraint is not None:
            self.constraint.check()
        self._token = token, logprobs
        self.tokens.append(token)
        e = next(self._events)
        self._tell_logprob(e)
        if self.request.is_text:
            self._tell_answer(self._stops.feed(e.text))
        else:
            for event in self._builder.add(e):
                self._tell(event)
        if e.finish_reason is None and not (self._stops.hit or self._builder.is_full):
            return None
        self._tell_answer(self._stops.flush())
        if not self.request.is_dropped:
            self.request.events.put(self.statistics(e))
        if self._stops.hit:
            return End("stop", stop_text=self._stops.found)
        return End(cast(Reason, e.finish_reason or "stop"), self._builder.message())

    def statistics(self, e: GenerationEvent) -> Statistics:
        """What the answer cost up to its last token."""
        return Statistics(
            prompt_tokens=len(self.prompt.ids),
            read_tokens=e.prompt_tokens,
            reused_tokens=e.cached_tokens,
            prompt_tps=e.prompt_tps,
            time_to_first_token_s=e.time_to_first_token_s,
            generated_tokens=e.generation_tokens,
            thinking_tokens=self._builder.thinking_tokens,
            generation_tps=e.generation_tps,
            drafted_tokens=self.counts.drafted,
            accepted_tokens=self.counts.accepted,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=self._seed,
            quantization=self._info.quantization,
            kv_quantization=self._info.kv_quantization,
        )

    def _make_events(self) -> Iterator[GenerationEvent]:
        """The events of tokens as `take` gets them; made at the first, when the prompt has been read."""
        yield from events_of(
            iter(lambda: cast(Any, self._token), None),
            self._tokenizer,
            self._splitter,
            self.limit,
            prompt_tokens=len(self.prompt.ids) - self.reused,
            cached_tokens=self.reused,
            before=self.prompt.ids,
            started=self._started,
            stopped=self.request.stopped.is_set,
            stop_ids=self.request.stop_ids,
        )

    def _tell(self, event: Event) -> None:
        if isinstance(event, AnswerText):
            self._tell_answer(self._stops.feed(event.text))
        elif isinstance(event, Revised):
            self._stops = StopText(self.request.stop)
            self.request.events.put(event)
            for logprob in self._thought_logprobs[self._builder.thinking_tokens :]:
                self.request.events.put(logprob)
        elif isinstance(event, (ThinkingText, ToolCall)) and not self._stops.hit:
            if isinstance(event, ToolCall):
                self._tell_answer(self._stops.flush())
            self.request.events.put(event)

    def _tell_answer(self, text: str) -> None:
        if text:
            self.request.events.put(AnswerText(text))

    def _tell_logprob(self, e: GenerationEvent) -> None:
        """Of the answer's tokens only: a thought and a stop token are not part of its text.

        Those of a thought are kept, for it may turn out to be the answer.
        """
        count = self.request.top_logprobs
        if count is None or e.finish_reason == "stop":
            return
        values = np.asarray(e.logprobs)
        best = np.argsort(-values, kind="stable")[:count].tolist()
        told = self._logprob(e.token, float(values[e.token]), [(i, float(values[i])) for i in best])
        if not self.request.is_text and (e.thinking or e.revised is not None):
            self._thought_logprobs.append(told)
        else:
            self.request.events.put(told)

    def _logprob(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        said = token_bytes(self._tokenizer, token)
        alternatives = tuple((token_bytes(self._tokenizer, i), value) for i, value in top if value > -math.inf)
        return TokenLogprob(said, logprob, self._offsets.next(said), alternatives)

    def _tell_token(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()) -> None:
        self.request.events.put(self._logprob(token, logprob, top))

    def _tell_prompt(self, logits: mx.array) -> None:
        """Of the prompt's tokens that come after those of a step, whose logits these are [n, vocab] float32."""
        check_finite(np.asarray(largest_logit(logits)).tolist())
        at, count = self.known + 1, self.request.top_logprobs or 0
        tokens = self.prompt.ids[at : at + logits.shape[0]]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        best = mx.argpartition(-logprobs, max(0, count - 1), axis=-1)[:, :count]
        own = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
        values = mx.take_along_axis(logprobs, best, axis=-1)
        likeliest = zip(np.asarray(best), np.asarray(values), strict=True)
        for token, logprob, (ids, each) in zip(tokens, np.asarray(own), likeliest, strict=True):
            top = sorted(zip(ids.tolist(), each.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
            self._tell_token(token, float(logprob), top)


def _ends_held_back(
    request: Request, tokenizer: TokenizerWrapper, vocabulary: int, prompt_tokens: int
) -> Iterator[LogitsProcessor]:
    """Processors with which the end comes as late as the request says."""
    before, own = prompt_tokens + request.min_tokens, tokenizer.eos_token_ids
    if request.ignore_eos:
        yield without(own, vocabulary, sys.maxsize)
    if ids := request.stop_ids | (set() if request.ignore_eos else own) if request.min_tokens else ():
        yield without(ids, vocabulary, before)
