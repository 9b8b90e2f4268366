"""One request in the running batch: its sampler and the text it has generated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.vocabulary import TextOffsets, token_bytes
from ring_mlx.engine.events import AnswerText, Event, Revised, ThinkingText, ToolCall
from ring_mlx.generation.decoding import LogitsProcessor
from ring_mlx.generation.sampling import start_sampling
from ring_mlx.generation.speech import Speech
from ring_mlx.generation.stream import GenerationEvent, events_of, thought_closer
from ring_mlx.generation.thinking import Thinking, splitter_after
from ring_mlx.serve.job import Finished, Job, TokenLogprob, Usage
from ring_mlx.serve.stops import StopText

GOLDEN = 0x9E3779B97F4A7C15


class Row:
    """A request that is being answered.

    Args:
        job: The request.
        cached: Prompt tokens that a snapshot knew.
        tokenizer: The model's.
        vocabulary: Its size.
        thinking: How answers start, and the room that a thought leaves.

    Raises:
        OptionError: If the sampling cannot work with the vocabulary.
    """

    def __init__(
        self,
        job: Job,
        cached: int,
        tokenizer: TokenizerWrapper,
        vocabulary: int,
        thinking: Thinking = Thinking(),  # noqa: B008 a value
    ) -> None:
        asked, ids = job.asked, job.prompt.ids
        self.job, self.cached, self._tokenizer = job, cached, tokenizer
        self._sampler, processors, self._seed = start_sampling(asked.sampling, vocabulary, tokenizer)
        s = asked.sampling
        looked_at = max(s.repetition_context_size, s.presence_context_size, s.frequency_context_size)
        before = mx.array(ids[:-1][-looked_at:], dtype=mx.int32)
        self.processors = [_with_history(p, before) for p in processors]
        splitter = splitter_after(job.prompt.text, thinking.start, asked.chat and tokenizer.has_thinking)
        room = thinking if asked.chat else Thinking(answer_room=0)
        self._forced = thought_closer(tokenizer, splitter, asked.thinking_budget, room, job.limit)
        self._speech, self._stops, self._called = Speech(has_tools=bool(asked.tools)), StopText(asked.stop), False
        self._token, self._chosen = 0, 0
        self._logprobs = mx.zeros(0)
        self._thought_logprobs: list[TokenLogprob] = []
        self._offsets = TextOffsets()
        self._events = events_of(
            self._steps(),
            tokenizer,
            splitter,
            job.limit,
            prompt_tokens=len(ids) - cached,
            cached_tokens=cached,
            before=ids,
        )

    @property
    def generated(self) -> int:
        """Tokens so far."""
        return len(self._speech.tokens)

    def choose(self, logprobs: mx.array) -> mx.array:
        """The next token [1] from log-probabilities [1, vocab]; what it draws depends on no other request."""
        if self.job.asked.top_logprobs is not None:
            self._logprobs = logprobs[0]
        forced = self._forced() if self._forced else None
        if forced is not None:
            return mx.array([forced], dtype=mx.uint32)
        if self.job.asked.sampling.temp != 0:
            mx.random.seed((self._seed + self._chosen * GOLDEN) % (1 << 64))
        self._chosen += 1
        return self._sampler(logprobs)

    def take(self, token: int) -> bool:
        """Say what a token adds; returns whether it was the last."""
        self._token = token
        e, put = next(self._events), self.job.events.put
        self._tell_logprob(e)
        if self.job.asked.chat:
            for event in self._speech.add(e):
                self._say(event)
        else:
            self._speech.tokens.append(token)
            self._answer_text(self._stops.feed(e.text))
        if e.finish_reason is None and not self._stops.hit:
            return False
        self._answer_text(self._stops.flush())
        put(Finished(self._reason(e), self.usage()))
        return True

    def _reason(self, e: GenerationEvent) -> str:
        if self._called:
            return "tool_calls"
        if self._stops.hit:
            return "stop"
        return "length" if self._speech.is_all_thought else str(e.finish_reason)

    def usage(self) -> Usage:
        """What it has cost so far."""
        return Usage(len(self.job.prompt.ids), self.cached, self.generated, self._speech.thinking_tokens)

    def message(self) -> dict[str, Any] | None:
        """The assistant's turn as the client will send it back; None where a stop sequence cut it."""
        return None if self._stops.hit else self._speech.message()

    def _steps(self) -> Iterator[tuple[int, mx.array]]:
        while True:
            yield self._token, self._logprobs

    def _say(self, event: Event) -> None:
        if isinstance(event, AnswerText):
            self._answer_text(self._stops.feed(event.text))
        elif isinstance(event, Revised):
            self._stops, self._called = StopText(self.job.asked.stop), False
            self.job.events.put(event)
            for logprob in self._thought_logprobs[self._speech.thinking_tokens :]:
                self.job.events.put(logprob)
        elif isinstance(event, (ThinkingText, ToolCall)) and not self._stops.hit:
            if isinstance(event, ToolCall):
                self._answer_text(self._stops.flush())
                self._called = True
            self.job.events.put(event)

    def _answer_text(self, text: str) -> None:
        if text:
            self.job.events.put(AnswerText(text))

    def _tell_logprob(self, e: GenerationEvent) -> None:
        """Of the answer's tokens only: a thought and a stop token are not part of its text.

        Those of a thought are kept, for it may turn out to be the answer.
        """
        count = self.job.asked.top_logprobs
        if count is None or e.finish_reason == "stop":
            return
        values = np.asarray(e.logprobs)
        best = np.argsort(-values, kind="stable")[:count].tolist()
        top = tuple((token_bytes(self._tokenizer, i), float(values[i])) for i in best)
        token = token_bytes(self._tokenizer, e.token)
        told = TokenLogprob(token, float(values[e.token]), self._offsets.next(token), top)
        if self.job.asked.chat and (e.thinking or e.revised is not None):
            self._thought_logprobs.append(told)
        else:
            self.job.events.put(told)


def _with_history(process: LogitsProcessor, before: mx.array) -> LogitsProcessor:
    """Let a processor see the prompt's end, of which the batch knows only the last token."""
    return lambda tokens, logits: process(mx.concatenate([before, tokens]), logits)
