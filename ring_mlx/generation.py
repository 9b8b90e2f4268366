"""Prefill and decode: tokens in, a stream of events out; knows the model's call and a tokenizer, not files or screens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.errors import OptionError, PromptError
from ring_mlx.model import Model
from ring_mlx.thinking import THINK_END, ThoughtBudget, ThoughtSplitter, opens_thought

PREFILL_STEP_SIZE = 2048
CLEAR_EVERY_TOKENS = 256

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values of softmax layers are quantised; linear states never are.

    Args:
        bits: 2, 4 or 8.
        group_size: 32, 64 or 128, a divisor of head_dim.
        start: Tokens before which keys and values stay as they are.
    """

    bits: int
    group_size: int = 64
    start: int = 5000

    def check(self, head_dim: int) -> None:
        """Raises OptionError where MLX could not hold a head of this size."""
        if self.bits not in (2, 4, 8):
            raise OptionError(f"kv bits {self.bits} is not one of 2, 4, 8; choose one of them.")
        if self.group_size not in (32, 64, 128) or head_dim % self.group_size:
            raise OptionError(
                f"kv group size {self.group_size} is not 32, 64 or 128 or does not divide head_dim {head_dim}; "
                "choose one that does."
            )


@dataclass(frozen=True)
class GenerationEvent:
    """One generated token.

    ``text`` over all events is the whole output, tags included; ``thinking_text`` and ``answer_text`` are its two
    parts without tags. The last event has a ``finish_reason``: "stop" (a stop token, whose text is not shown) or
    "length". ``thinking`` says where the token belongs; tags belong to the thought. Times are seconds, memory is
    in GB (1e9 bytes); ``prompt_tokens`` counts what was read, ``cached_tokens`` what the cache already held.
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
    finish_reason: str | None = None


def generate_step(
    prompt: Sequence[int] | mx.array,
    model: Model,
    cache: Any,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefill_step_size: int = PREFILL_STEP_SIZE,
    kv_quantization: KVQuantization | None = None,
    progress: Progress | None = None,
    next_forced: Callable[[], int | None] | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Read the prompt in steps, then yield tokens, computing each while the one before is handled.

    A token is fed to the cache before it is yielded, but for the last of ``max_tokens``; ``cache.offset`` says what
    the cache has seen. Stopping anywhere leaves a cache that holds a prefix of prompt and output.

    Args:
        prompt: Ids [T], at least one, that continue the cache.
        model: The model.
        cache: From ``model.make_cache()``; updated in place.
        max_tokens: How many.
        sampler: Log-probabilities [1, vocab] to ids [1]; greedy by default.
        logits_processors: mlx-lm's kind, applied in order to (ids so far, logits [1, vocab]).
        prefill_step_size: Prompt tokens a step.
        kv_quantization: For the softmax layers, or None.
        progress: Called with (prompt tokens done, all) before the first step and after each.
        next_forced: Called before each token; an id that it returns takes the place of the sampled one.

    Yields:
        The id and its distribution, log-probabilities [vocab] float32.
    """
    prompt = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)
    total, done = prompt.size, 0
    choose = sampler or greedy_sampler
    history = prompt
    report = progress or (lambda done, total: None)

    def forward(tokens: mx.array) -> mx.array:
        logits = model(tokens[None], cache, last_only=True)[:, -1].astype(mx.float32)
        if kv_quantization is not None:
            maybe_quantize_kv_cache(cache, kv_quantization.start, kv_quantization.group_size, kv_quantization.bits)
        return logits

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = forward(tokens)
        for process in logits_processors:
            logits = process(history, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return choose(logprobs), logprobs[0]

    report(0, total)
    while total - done > prefill_step_size:
        forward(prompt[done : done + prefill_step_size])
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        done += prefill_step_size
        report(done, total)
    y, logprobs = step(prompt[done:])
    mx.async_eval(y, logprobs)
    for n in range(max_tokens):
        forced = next_forced() if next_forced else None
        if forced is not None:
            y = mx.array([forced], dtype=mx.int32)
        if logits_processors:
            history = mx.concatenate([history, y.astype(history.dtype)])
        if n + 1 < max_tokens:
            following = step(y)
            mx.async_eval(*following)
        token = int(np.asarray(y)[0])
        if n == 0:
            report(total, total)
        yield token, logprobs
        if n + 1 < max_tokens:
            y, logprobs = following
        if n % CLEAR_EVERY_TOKENS == 0:
            mx.clear_cache()


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    cache: Any | None = None,
    thinking_budget: int | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefill_step_size: int = PREFILL_STEP_SIZE,
    kv_quantization: KVQuantization | None = None,
    progress: Progress | None = None,
) -> Iterator[GenerationEvent]:
    """Generate text from a prompt, one event a token.

    Args:
        model: The model.
        tokenizer: mlx-lm's wrapper, as `load` returns it.
        prompt: Rendered text or ids; with a cache, what follows the tokens that the cache holds.
        max_tokens: At most so many tokens; the end of the context may come first.
        cache: Continue this cache; updated in place. None starts anew.
        thinking_budget: Close the thought after so many tokens; None lets it run.
        sampler, logits_processors, prefill_step_size, kv_quantization, progress: As for `generate_step`.

    Yields:
        Events; the last has a finish reason.

    Raises:
        PromptError: If the prompt is empty or exceeds the context.
        OptionError: If ``max_tokens``, ``prefill_step_size`` or ``thinking_budget`` is out of range.
    """
    ids = _encode(tokenizer, prompt)
    cache = model.make_cache() if cache is None else cache
    cached = int(cache.offset)
    _check_lengths(model, len(ids), cached, max_tokens, prefill_step_size, thinking_budget)
    if kv_quantization is not None:
        kv_quantization.check(model.config.head_dim)
    detokenizer = tokenizer.detokenizer
    splitter = ThoughtSplitter(opens_thought(tokenizer.decode(ids)))
    budget = None
    if thinking_budget is not None:
        closing = tokenizer.encode(f"\n{THINK_END}\n\n", add_special_tokens=False)
        budget = ThoughtBudget(thinking_budget, closing, lambda: splitter.inside)
    limit = min(max_tokens, model.config.max_position_embeddings - cached - len(ids) + 1)
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
        next_forced=budget.next_forced if budget else None,
    )
    started = time.perf_counter()
    first = started
    for n, (token, logprobs) in enumerate(steps, start=1):
        now = time.perf_counter()
        if n == 1:
            first = now
        stops = token in tokenizer.eos_token_ids
        was_inside = splitter.inside
        if not stops:
            detokenizer.add_token(token)
        if stops or n == limit:
            text = _final_segment(detokenizer)
            parts = [a + b for a, b in zip(splitter.feed(text), splitter.flush(), strict=True)]
        else:
            text = detokenizer.last_segment
            parts = list(splitter.feed(text))
        yield GenerationEvent(
            text=text,
            token=token,
            logprobs=logprobs,
            thinking=was_inside or splitter.inside,
            thinking_text=parts[0],
            answer_text=parts[1],
            prompt_tokens=len(ids),
            cached_tokens=cached,
            prompt_tps=len(ids) / max(first - started, 1e-9),
            generation_tokens=n,
            generation_tps=(n - 1) / (now - first) if n > 1 else 0.0,
            time_to_first_token_s=first - started,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason="stop" if stops else "length" if n == limit else None,
        )
        if stops:
            break


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array, **options: Any) -> str:
    """The whole text of `stream_generate`, which takes the same options."""
    return "".join(event.text for event in stream_generate(model, tokenizer, prompt, **options))


def _encode(tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array) -> list[int]:
    if isinstance(prompt, str):
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return [int(i) for i in tokenizer.encode(prompt, add_special_tokens=not has_bos)]
    if isinstance(prompt, mx.array):
        return [int(i) for i in np.asarray(prompt).ravel()]
    return [int(i) for i in prompt]


def _check_lengths(
    model: Model, prompt: int, cached: int, max_tokens: int, prefill_step_size: int, thinking_budget: int | None
) -> None:
    context = model.config.max_position_embeddings
    if prompt == 0:
        raise PromptError("the prompt is empty; give some text.")
    if prompt + cached > context:
        raise PromptError(
            f"{prompt + cached} tokens exceed the context of {context}; shorten the prompt or use a checkpoint with "
            "a longer context."
        )
    if max_tokens < 1:
        raise OptionError(f"max tokens {max_tokens} is not positive; give 1 or more.")
    if prefill_step_size < 1:
        raise OptionError(f"prefill step size {prefill_step_size} is not positive; give 1 or more.")
    if thinking_budget is not None and thinking_budget < 0:
        raise OptionError(f"thinking budget {thinking_budget} is negative; give 0 or more.")


def _final_segment(detokenizer: Any) -> str:
    """What is left at the end, without the half of a character whose other bytes never came."""
    detokenizer.finalize()
    return str(detokenizer.last_segment).rstrip("\ufffd")
