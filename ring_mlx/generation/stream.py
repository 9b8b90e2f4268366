"""Text generation as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

from ring_mlx.checkpoint.vocabulary import ByteDetokenizer, TextDetokenizer, whole_ids
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.generation.decoding import (
    LogitsProcessor,
    Progress,
    Sampler,
    generate_step,
)
from ring_mlx.generation.sampling_ranges import RANGES, REST, OutOfRangeError, within
from ring_mlx.generation.thinking import Thinking, ThoughtBudget, ThoughtSplitter, splitter_after
from ring_mlx.generation.thought_end import THINK_END
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import whole_text


@dataclass(frozen=True)
class GenerationEvent:
    """One generated token.

    ``text`` over all events is the whole output, tags included; ``thinking_text`` and ``answer_text`` are its two
    parts without tags. ``revised`` is set where earlier parts were wrong, as `ring_mlx.generation.thinking` says: the right
    thought and answer so far; the parts of its event are then what is new in each. The last event has a ``finish_reason``: "stop" (a stop token, whose text is not shown),
    "length" or "stopped" (from outside). ``thinking`` says where the token belongs; tags belong to the thought, of which
    there are ``thinking_tokens`` so far. Where not ``is_certain``, a later event may revise ``answer_text``. Times are seconds, memory is in GB (1e9 bytes); ``prompt_tokens`` counts what was read, ``cached_tokens`` what the cache already held.
    """

    text: str
    token: int
    logprobs: mx.array
    thinking: bool
    thinking_text: str
    answer_text: str
    prompt_tokens: int
    cached_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    time_to_first_token_s: float
    peak_memory: float
    thinking_tokens: int
    finish_reason: str | None = None
    revised: tuple[str, str] | None = None
    is_certain: bool = True


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = REST,
    cache: Any | None = None,
    thinking_budget: int | None = None,
    thinking: Thinking | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefill_step_size: int | None = None,
    kv_quantization: KVQuantization | None = None,
    progress: Progress | None = None,
) -> Iterator[GenerationEvent]:
    """Generate text from a prompt, one event a token.

    Args:
        model: The model.
        tokenizer: mlx-lm's wrapper, as `load` returns it.
        prompt: Rendered text or ids; with a cache, what follows the tokens that the cache holds.
        max_tokens: At most so many tokens; the end of the context may come first. -1 is as many as it holds.
        cache: Continue this cache; updated in place. None starts a new one.
        thinking_budget: Close the thought after so many tokens; None leaves room for an answer, as ``thinking`` says.
        thinking: What is known of the model's thoughts; by default prompt and text decide.
        sampler, logits_processors, prefill_step_size, kv_quantization, progress: As for `generate_step`.

    Yields:
        Events; the last has a finish reason.

    Raises:
        PromptError: If the prompt is empty or exceeds the context, or an id has no row in the embedding.
        ModelError: If the logits are not finite.
        OptionError: If ``max_tokens``, ``prefill_step_size`` or ``thinking_budget`` is out of range.
    """
    ids = whole_ids(encode_prompt(tokenizer, prompt), model.config.vocab_size)
    cache = model.make_cache() if cache is None else cache
    cached = int(cache.offset)
    check_lengths(model, len(ids), cached, max_tokens, prefill_step_size, thinking_budget)
    if kv_quantization is not None:
        kv_quantization.check(model.config.head_dim)
    thinking = thinking or Thinking()
    splitter = splitter_after(tokenizer.decode(ids), thinking.start)
    limit = within(max_tokens, model.config.context_tokens - cached - len(ids) + 1)
    steps = generate_step(
        ids,
        model,
        cache,
        max_tokens=limit,
        sampler=sampler,
        logits_processors=logits_processors,
        prefill_step_size=prefill_step_size,
        kv_quantization=kv_quantization,
        progress=progress,
        next_forced=thought_closer(tokenizer, splitter, thinking_budget, thinking, limit),
    )
    yield from events_of(steps, tokenizer, splitter, limit, prompt_tokens=len(ids), cached_tokens=cached, before=ids)


def thought_closer(
    tokenizer: TokenizerWrapper,
    splitter: ThoughtSplitter,
    budget: int | None,
    thinking: Thinking,
    limit: int,
) -> Callable[[], int | None] | None:
    """The ``next_forced`` of `decode` that closes a thought after ``budget`` tokens.

    If that is None, ``thinking`` says how much room a thought leaves of the ``limit`` tokens that may be generated.
    """
    closing = tokenizer.encode(f"\n{THINK_END}\n\n", add_special_tokens=False)
    if budget is None:
        if (most := thinking.budget(limit)) is None:
            return None
        budget = max(0, most - len(closing))
    return ThoughtBudget(budget, closing, lambda: splitter.may_be_closed, splitter.close_next).next_forced


def events_of(
    steps: Iterator[tuple[int, mx.array]],
    tokenizer: TokenizerWrapper,
    splitter: ThoughtSplitter,
    limit: int,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    before: Sequence[int] = (),
    started: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    stop_ids: Container[int] = (),
) -> Iterator[GenerationEvent]:
    """Tokens to events, up to a stop token or the ``limit``-th token.

    Args:
        steps: From `generate_step` or `decode`.
        tokenizer: Its stop tokens end the text.
        splitter: Tells thought from answer; it knows whether the prompt opened a thought.
        limit: How many tokens ``steps`` gives at most.
        prompt_tokens, cached_tokens: Passed on.
        before: The prompt, or its end, which the text goes on with.
        started: When reading the prompt began (``time.perf_counter``), by default now.
        stopped: Asked after each token; where it is true, the event is the last and its reason "stopped".
        stop_ids: More stop tokens.
    """
    detokenizer = tokenizer.detokenizer
    if isinstance(detokenizer, TextDetokenizer):
        detokenizer.follow(before)
    first = started = time.perf_counter() if started is None else started
    for n, (token, logprobs) in enumerate(steps, start=1):
        now = time.perf_counter()
        if n == 1:
            first = now
        stops = token in tokenizer.eos_token_ids or token in stop_ids
        reason = "stop" if stops else "length" if n == limit else "stopped" if stopped() else None
        if not stops:
            detokenizer.add_token(token)
        if reason is not None:
            text = _final_segment(detokenizer)
            parts = splitter.feed_last(text)
        else:
            text = detokenizer.last_segment
            parts = splitter.feed(text)
        yield GenerationEvent(
            text=text,
            token=token,
            logprobs=logprobs,
            thinking=splitter.thinking_tokens >= n,
            thinking_text=parts[0],
            answer_text=parts[1],
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            prompt_tps=prompt_tokens / max(first - started, 1e-9),
            generation_tokens=n,
            generation_tps=(n - 1) / (now - first) if n > 1 else 0.0,
            time_to_first_token_s=first - started,
            peak_memory=mx.get_peak_memory() / 1e9,
            thinking_tokens=splitter.thinking_tokens,
            finish_reason=reason,
            revised=splitter.revised,
            is_certain=splitter.is_certain,
        )
        if reason is not None:
            break


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array, **options: Any) -> str:
    """The whole text of `stream_generate`, which takes the same options."""
    return "".join(event.text for event in stream_generate(model, tokenizer, prompt, **options))


def encode_prompt(tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array) -> list[Any]:
    """The ids of a prompt; text gets the tokenizer's special tokens unless it starts with them, ids stay as they are."""
    if isinstance(prompt, str):
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return [int(i) for i in tokenizer.encode(whole_text(prompt), add_special_tokens=not has_bos)]
    return np.asarray(prompt).ravel().tolist() if isinstance(prompt, mx.array) else list(prompt)


def check_lengths(
    model: Model, prompt: int, cached: int, max_tokens: int, prefill_step_size: int | None, thinking_budget: int | None
) -> None:
    """Raises PromptError or OptionError if a request cannot be answered."""
    context = model.config.context_tokens
    if prompt == 0:
        raise PromptError("the prompt is empty; give some text.")
    if prompt + cached > context:
        raise PromptError(
            f"{prompt + cached} tokens exceed the context of {context}; shorten the prompt or use a checkpoint with "
            "a longer context."
        )
    if prefill_step_size is not None and prefill_step_size < 1:
        raise OptionError(f"prefill step size {prefill_step_size} is not positive; give 1 or more.")
    for name, value in (("max_tokens", max_tokens), ("thinking_budget", thinking_budget)):
        try:
            if value is not None or name == "max_tokens":
                RANGES[name].check(value)
        except OutOfRangeError as e:
            raise OptionError(f"{e}; give one.") from None


def _final_segment(detokenizer: StreamingDetokenizer) -> str:
    """The rest of the text, without an incomplete character at its end.

    It becomes whole when the answer is continued.
    """
    if isinstance(detokenizer, ByteDetokenizer):
        return str(detokenizer.last_segment)  # it keeps halves to itself
    detokenizer.finalize()
    return str(detokenizer.last_segment).rstrip("\ufffd")
