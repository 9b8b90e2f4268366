"""A model's answers to a suite of questions; knows conversations and batches, not files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.decoding import check_finite, largest_logit, prefill_step_or_default
from ring_mlx.model import Model
from ring_mlx.suite import Question, extract_answer
from ring_mlx.tokenizer import render_chat

# Rows that have ended leave a batch when they are so many of it: each costs as much as one that goes on.
DROPPED_SHARE = 0.25


@dataclass(frozen=True)
class Result:
    """What the model said to a question, and whether its final answer is exactly the right one."""

    question: Question
    text: str
    given: str

    @property
    def right(self) -> bool:
        """Exact match of the final answer."""
        return self.given == self.question.answer


def evaluate(
    model: Model,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    *,
    max_tokens: int = 400,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Answer every question greedily, in batches of similar length.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a chat template.
        questions: The suite.
        max_tokens: Of an answer, thought included.
        batch_size: Questions at a time.
        progress: Called with (questions done, all).

    Returns:
        Results in the order of the questions.
    """
    prompts = [render_chat(tokenizer, q.messages) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, ids in zip(part, complete(model, [prompts[i] for i in part], max_tokens, tokenizer.eos_token_ids)):  # noqa: B905
            texts[i] = tokenizer.decode(ids)
        if progress:
            progress(len(texts), len(order))
    return [Result(q, texts[i], extract_answer(texts[i])) for i, q in enumerate(questions)]


def complete(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Iterable[int]) -> list[list[int]]:
    """Greedy continuations of several prompts at once, without the stop tokens.

    Rows are padded on the left; the padding enters no state and no attention.
    """
    width, stops = max(map(len, prompts)), set(stop)
    pads = [width - len(p) for p in prompts]
    cache = model.make_cache(left_padding=pads)
    batch = mx.array([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)], dtype=mx.int32)
    step = prefill_step_or_default()
    for at in range(0, width, step):
        logits = model(batch[:, at : at + step], cache, last_only=True)
        mx.eval(logits, cache.state)
    out: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(len(prompts))), set[int]()  # the prompt of each row, and the rows that said all
    for _ in range(max_tokens):
        y, largest = mx.argmax(logits[:, -1], axis=-1), largest_logit(logits[:, -1])
        mx.eval(y, largest)
        check_finite(np.asarray(largest).tolist())
        for row, token in enumerate(_ids(y)):
            if token in stops:
                ended.add(row)
            elif row not in ended:
                out[rows[row]].append(token)
        if len(ended) == len(rows):
            break
        if len(ended) >= DROPPED_SHARE * len(rows):
            left = [row for row in range(len(rows)) if row not in ended]
            rows, ended = [rows[row] for row in left], set()
            for c in cache:
                c.filter(mx.array(left))
            y = y[mx.array(left)]
        logits = model(y[:, None], cache, last_only=True)
    return out


def accuracy_by_task(results: Iterable[Result]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each task, in order of appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for r in results:
        right, asked = counts.get(r.question.task, (0, 0))
        counts[r.question.task] = (right + r.right, asked + 1)
    return counts


def _ids(y: mx.array) -> list[int]:
    ids: Any = y.tolist()
    return list(ids)
