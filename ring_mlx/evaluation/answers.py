"""A model's answers to a suite of questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.evaluation.suite import Question, extract_answer
from ring_mlx.generation.decoding import decode_rows, prefill, prefill_step_or_default, step_sizes
from ring_mlx.generation.defaults import MAX_TOKENS
from ring_mlx.generation.sampling_ranges import within
from ring_mlx.generation.stream import check_lengths
from ring_mlx.generation.templates import render_text
from ring_mlx.generation.thinking import splitter_after
from ring_mlx.model.model import Model
from ring_mlx.system.progress import Progress, TimeLeft
from ring_mlx.system.terminal_text import is_seen

# Rows that have ended leave a batch when they are so many of it: each costs as much as one that goes on.
DROPPED_SHARE = 0.25
# A prompt so much longer than a batch's first begins another, since padding costs as much as a prompt.
MOST_PADDED, STEP_PADDED = 1.25, 64
# Multiples of it, without their whole parts, are spread evenly however many they are.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Result:
    """The model's text for a question, its part after the thought (``answer``) and its final answer (``given``)."""

    question: Question
    text: str
    given: str
    answer: str = ""
    is_cut_off: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the answer has no visible character."""
        return not is_seen(self.answer)

    @property
    def right(self) -> bool:
        return self.given == self.question.answer


def evaluate(
    model: Model,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    *,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Result]:
    """Answer every question greedily, in batches of similar length, long and short ones in turn.

    Args:
        max_tokens: Of an answer, thought included; -1 is what the context holds.
        batch_size: Questions at a time.
        progress: Called with (questions done, all, how many are right, seconds left) and after each step of a prompt.
    """
    texts = [render_text(tokenizer, q.messages) for q in questions]
    prompts = [[int(i) for i in tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    for prompt in prompts:
        check_lengths(model, len(prompt), 0, max_tokens, None, None)
    batches = _batches(prompts, batch_size)
    time_left = TimeLeft(tokens=sum(len(part) * _width(prompts, part) for part in batches), answers=len(questions))
    results: dict[int, Result] = {}

    def tell(tokens: int) -> None:
        if tokens:
            time_left.did("tokens", tokens)
        if progress:
            right = sum(r.right for r in results.values())
            progress(len(results), len(questions), f"{right} right" * bool(results), time_left.left_s())

    for part in batches:
        most = within(max_tokens, model.config.context_tokens - _width(prompts, part) + 1)
        answers = complete(model, [prompts[i] for i in part], most, tokenizer.eos_token_ids, tell)
        for i, ids in zip(part, answers, strict=True):
            text = tokenizer.decode(ids)
            answer = splitter_after(texts[i], is_likely=tokenizer.has_thinking).feed_last(text)[1]
            results[i] = Result(questions[i], text, extract_answer(answer), answer, len(ids) == most)
        time_left.did("answers", len(part))
        tell(0)
    return [results[i] for i in range(len(questions))]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The numbers of prompts of similar length together, and so in turn that any first batches are like all."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        last = batches[-1]
        if last and (len(last) == size or len(prompts[i]) > MOST_PADDED * len(prompts[last[0]]) + STEP_PADDED):
            batches.append([])
        batches[-1].append(i)
    return [batches[i] for i in sorted(range(len(batches)), key=lambda i: i * GOLDEN % 1)]


def _width(prompts: Sequence[Sequence[int]], part: Iterable[int]) -> int:
    return max(len(prompts[i]) for i in part)


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Iterable[int],
    tell: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """Greedy continuations of several prompts at once, without the stop tokens.

    Rows are padded on the left; the padding enters no state and no attention. ``tell`` is called with the tokens of each
    step of the prompts, padding included.
    """
    width, stops = max(map(len, prompts)), set(stop)
    pads = [width - len(p) for p in prompts]
    cache = model.make_cache(left_padding=pads)
    batch = mx.array([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)], dtype=mx.int32)
    sizes = step_sizes(width, prefill_step_or_default())
    for size, (_, step_logits) in zip(sizes, prefill(batch, model, cache, sizes), strict=True):
        logits = step_logits
        tell(len(prompts) * size)
    out: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(len(prompts))), set[int]()  # the prompt of each row, and the rows that have ended

    def keep(ids: list[int]) -> Sequence[int]:
        """Note what each row said; the rows that go on, once enough have ended."""
        nonlocal rows, ended
        for row, token in enumerate(ids):
            if token in stops:
                ended.add(row)
            elif row not in ended:
                out[rows[row]].append(token)
        if len(ended) < DROPPED_SHARE * len(rows):
            return range(len(rows))
        left = [row for row in range(len(rows)) if row not in ended]
        rows, ended = [rows[row] for row in left], set()
        return left

    for _ in decode_rows(logits, model, cache, max_tokens=max_tokens, keep=keep):
        pass
    return out


def accuracy_by_task(results: Iterable[Result]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each task, in order of appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for r in results:
        right, asked = counts.get(r.question.task, (0, 0))
        counts[r.question.task] = (right + r.right, asked + 1)
    return counts
