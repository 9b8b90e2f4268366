"""The only prefill and the only token loop: tokens in, tokens out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.sample_utils import greedy_sampler

from metal_kernels import choices, launch, peak
from ring_mlx.errors import ModelError, PromptError
from ring_mlx.generation.constraint import Constraint
from ring_mlx.model.decode_step import compiled, is_worthwhile
from ring_mlx.model.kv_quantization import KVQuantization
from ring_mlx.system.wired import Wired

CLEAR_EVERY_TOKENS = 256

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Progress = Callable[[int, int], None]
Forward = Callable[..., mx.array]  # as `Model.__call__`


def prefill_step_or_default(asked: int | None = None) -> int:
    """Prompt tokens a step: as asked, or as this machine chose, or 2,048 on a GPU and 128 on a CPU."""
    return int(choices.chosen("prefill_step")) if asked is None else asked


def step_sizes(total: int, step: int) -> list[int]:
    """The sizes of the steps in which ``total`` tokens are read, at most ``step`` each, for `prefill`."""
    return [min(step, total - start) for start in range(0, total, step)]


def generate_step(
    prompt: Sequence[int] | mx.array,
    model: Forward,
    cache: Any,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefill_step_size: int | None = None,
    kv_quantization: KVQuantization | None = None,
    progress: Progress | None = None,
    next_forced: Callable[[], int | None] | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Read the prompt in steps, then yield tokens, computing each while the one before is handled.

    A token is fed to the cache before it is yielded, but for the last of ``max_tokens``; ``cache.offset`` says what
    the cache has seen. Stopping anywhere leaves a cache that holds a prefix of prompt and output.

    Args:
        prompt: Ids [T], at least one, that continue the cache.
        cache: From ``model.make_cache()``; updated in place.
        sampler: Log-probabilities [1, vocab] to ids [1]; by default, and with mlx-lm's ``greedy_sampler``, the likeliest.
        logits_processors: mlx-lm's kind, applied in order to (ids so far, logits [1, vocab]).
        prefill_step_size: Prompt tokens a step, by default `prefill_step_or_default`.
        kv_quantization: For the softmax layers, or None.
        progress: Called with (prompt tokens done, all) before the first step and after each.
        next_forced: Called before each token; an id that it returns takes the place of the sampled one.

    Yields:
        The id and its distribution, log-probabilities [vocab] float32, which are computed only where they are used.

    Raises:
        PromptError: If the prompt is empty.
        ModelError: If the logits are not finite.
    """
    prompt = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)
    total = prompt.size
    if total == 0:
        raise PromptError("the prompt is empty; give one id or more.")
    report = progress or (lambda *_: None)
    sizes = step_sizes(total, prefill_step_or_default(prefill_step_size))
    report(0, total)
    with Wired():
        for done, step_logits in prefill(prompt, model, cache, sizes, kv_quantization):
            logits = step_logits
            if done < total:
                report(done, total)
        tokens = decode(
            logits,
            model,
            cache,
            prompt,
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            kv_quantization=kv_quantization,
            next_forced=next_forced,
        )
        for n, (token, logprobs) in enumerate(tokens):
            if n == 0:
                report(total, total)
            yield token, logprobs


def prefill(
    prompt: mx.array,
    model: Forward,
    cache: Any,
    sizes: Sequence[int],
    kv_quantization: KVQuantization | None = None,
    *,
    every_position: bool = False,
) -> Iterator[tuple[int, mx.array]]:
    """Read a prompt in steps of the given sizes; leaving after any step leaves a usable cache.

    Args:
        prompt: Ids [T], or [B, T] of rows of equal length, that continue the cache.
        sizes: Tokens of each step, T in all.

    Yields:
        Tokens done, and the logits [B, vocab] float32 of the next token, which are computed if they are used; with
        ``every_position`` those of all positions of the step [B, size, vocab]. The cache has been computed.
    """
    rows, done = prompt if prompt.ndim == 2 else prompt[None], 0
    with launch.doubting():
        for size in sizes:
            part = rows[:, done : done + size]
            done += size
            logits = forward(part, model, cache, kv_quantization, last_only=not every_position).astype(mx.float32)
            if every_position or done == rows.shape[1]:
                mx.async_eval(logits)
            mx.eval([c.state for c in cache])
            mx.clear_cache()
            yield done, logits if every_position else logits[:, 0]


def decode(
    logits: mx.array, model: Forward, cache: Any, history: mx.array, **options: Any
) -> Iterator[tuple[int, mx.array]]:
    """Yield the tokens of one row as `generate_step` does, after a prompt that has been read; options of `decode_rows`."""
    for (token,), logprobs in decode_rows(logits, model, cache, history, **options):
        yield token, logprobs[0]


def decode_rows(
    logits: mx.array,
    model: Forward,
    cache: Any,
    history: mx.array | None = None,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    kv_quantization: KVQuantization | None = None,
    next_forced: Callable[[], int | None] | None = None,
    constraint: Constraint | None = None,
    keep: Callable[[list[int]], Sequence[int]] | None = None,
) -> Iterator[tuple[list[int], mx.array]]:
    """The token loop: yield a token of each row at a time, computing the next while this one is handled.

    Args:
        logits: Of the first tokens, [B, vocab] float32.
        history: The ids read so far [T], which the processors of a single row need.
        constraint: The form of a single row's answer, or None.
        keep: Called with each step's ids; returns the rows that go on, none to stop. The next step waits for it.

    Yields:
        The ids of the rows, and their log-probabilities [B, vocab] float32.
    """
    picker = Picker(sampler, logits_processors, history, next_forced, constraint)
    with launch.doubting():
        picker.picked = picker.pick(logits)
        for n in range(max_tokens):
            picked, following = picker.ask(), None
            if keep is not None and len(rows := list(keep(picked.ids()))) < picked.y.size:
                if not rows:
                    return
                picked = Picked(*(a[mx.array(rows)] for a in picked))
                for c in cache:
                    c.filter(mx.array(rows))
            picker.add(picked.y)
            if n + 1 < max_tokens:
                following = picker.pick(forward(picked.y[:, None], model, cache, kv_quantization)[:, 0])
            yield picked.ids(), picked.logprobs
            picker.give(following)
            if n % CLEAR_EVERY_TOKENS == CLEAR_EVERY_TOKENS - 1:
                mx.clear_cache()


class Picked(NamedTuple):
    """The next ids [B], the largest logits [B], and the distributions [B, vocab]; computed when used."""

    y: mx.array
    largest: mx.array
    logprobs: mx.array

    def ids(self) -> list[int]:
        """The ids; raises ModelError if the logits are not finite."""
        check_finite(np.asarray(self.largest).tolist())
        return list(np.asarray(self.y).tolist())

    def replaced(self, forced: int | None) -> Picked:
        """The same, or with another id of a single row."""
        return self if forced is None else self._replace(y=mx.array([forced], dtype=mx.int32))


class Picker:
    """Chooses tokens from logits, and keeps the last token of a single row (``given``) and the next (``picked``).

    Args:
        sampler, next_forced: As of `generate_step`.
        processors: Applied to the logits of a single row, whose ids so far are ``history`` and those of `add`.
        constraint: What a single row is held to. It must know a token before the next one is picked, which costs no time
            while the device computes the logits.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
        history: mx.array | None,
        next_forced: Callable[[], int | None] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.sampler = None if sampler is greedy_sampler else sampler
        self.processors = processors
        self._seen = mx.zeros((0,), dtype=mx.int32) if history is None else history
        self._next_forced, self._is_asked = next_forced, False
        self.constraint, self._added, self._ahead = constraint, list[mx.array](), 0
        self.picked: Picked | None = None
        self.given: Picked | None = None

    def add(self, y: mx.array) -> None:
        """Take ids [n] that follow."""
        if self.processors:
            self._seen = mx.concatenate([self._seen, y.astype(self._seen.dtype)])
        if self.constraint is not None:
            self._added.append(y)

    def ask(self) -> Picked:
        """The next token, or the one that must come in its place; that is asked once for each."""
        assert self.picked is not None
        if self._next_forced is not None and not self._is_asked:
            self.picked = self.picked.replaced(self._next_forced())
        self._is_asked = True
        return self.picked

    def give(self, following: Picked | None = None) -> Picked:
        """The next token becomes the last one; ``following`` comes after it, where that is known."""
        assert self.picked is not None
        self.given, self.picked, self._is_asked = self.picked, following, False
        return self.given

    @property
    def _is_plain(self) -> bool:
        """Whether the likeliest token is picked, whatever was said."""
        return self.sampler is None and not self.processors and self.constraint is None

    def pick(self, logits: mx.array, tokens: mx.array | None = None) -> Picked:
        """From logits [B, vocab]; ``tokens`` follow those that were added."""
        seen = self._seen if tokens is None else mx.concatenate([self._seen, tokens.astype(self._seen.dtype)])
        exact = logits.astype(mx.float32)
        y, largest = likeliest(logits) if self._is_plain else (None, largest_logit(logits))
        for process in self.processors:
            logits = exact = process(seen, exact)
        if self.constraint is not None:
            mx.async_eval(exact)
            self._tell(self.constraint, tokens)
            logits = exact = self.constraint.masked(exact)
        logprobs = exact - mx.logsumexp(exact, axis=-1, keepdims=True)
        if y is None:
            y = self.sampler(logprobs) if self.sampler else mx.argmax(logits, axis=-1)
        mx.async_eval(y, largest)
        return Picked(y, largest, logprobs)

    def _tell(self, constraint: Constraint, tokens: mx.array | None) -> None:
        """Let the constraint take what came; some of what is added now may have been told when it followed."""
        added = [i for y in self._added for i in np.asarray(y).tolist()]
        following = [] if tokens is None else np.asarray(tokens).tolist()
        constraint.take([*added, *following][self._ahead :])
        self._added, self._ahead = [], len(following)

    def pick_each(self, logits: mx.array, tokens: Sequence[int]) -> Iterator[Picked]:
        """From logits [T, vocab] after each of the tokens [T], which follow those that were added; drawn as they are wanted."""
        if self._is_plain:
            found = self.pick(logits)
            each = [Picked(*(a[n : n + 1] for a in found)) for n in range(len(tokens))]
            mx.async_eval([(p.y, p.largest) for p in each])  # at once, since each would wait for its own
            yield from each
            return
        after = mx.array(list(tokens), dtype=mx.int32)
        for n in range(len(tokens)):
            yield self.pick(logits[n : n + 1], after[: n + 1])


def likeliest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The likeliest id of each row [B, vocab], uint32, and `largest_logit`, in one dispatch where kernels run."""
    where = launch.backend()
    return peak(logits) if where is None else _peak(where, where.ledger and where.ledger.turned_off)(logits)


@lru_cache(maxsize=8)
def _peak(where: launch.Backend, turned_off: int | None) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    return compiled(peak) if is_worthwhile() else peak


def largest_logit(logits: mx.array) -> mx.array:
    """The largest logit of each row [..., vocab], for `check_finite`: NaN if there is one; excluded tokens do not count."""
    return mx.max(logits, axis=-1).astype(mx.float32)


def check_finite(largest: Iterable[float]) -> None:
    """Raises ModelError unless every `largest_logit` is finite."""
    wrong = [v for v in largest if not math.isfinite(v)]
    if wrong:
        raise ModelError(
            f"the largest logit is {wrong[0]}, so no token follows; the weights are damaged or overflow: download or "
            "convert the checkpoint again, or try --exact."
        )


def forward(
    tokens: mx.array, model: Forward, cache: Any, kv_quantization: KVQuantization | None = None, last_only: bool = True
) -> mx.array:
    """Logits [B, 1, vocab] after the tokens [B, T], or [B, T, vocab] after each, in the model's dtype."""
    logits = model(tokens, cache, last_only=last_only)
    if kv_quantization is not None:
        maybe_quantize_kv_cache(cache, kv_quantization.start, kv_quantization.group_size, kv_quantization.bits)
    return logits[:, -1:] if last_only else logits
