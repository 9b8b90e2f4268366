"""Generated conversations in which the assistant thinks in small steps and then gives a short answer.

`make` draws one of a task, `stream` an endless mix, `eval_suite` held-out ones; `render` gives the text to train on.
The split is by what is asked: operands (as sets), words, facts and phrasings of the test split never occur in train,
neither asked nor as a step shown on the way. Steps on single digits are shared, since they make up all the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from demo import tasks_chat, tasks_date, tasks_number, tasks_recall, tasks_word
from demo.render import as_dicts, render
from demo.split import SPLITS, Conversation, Message, Turn, conversation, extract_answer
from demo.tasks_recall import CountTokens, approximate_tokens, make_recall
from demo.tasks_topic import make_topic_recall

__all__ = [
    "SPLITS",
    "TASKS",
    "TASK_WEIGHTS",
    "Conversation",
    "Message",
    "as_dicts",
    "eval_suite",
    "extract_answer",
    "make",
    "make_recall",
    "render",
    "stream",
]

Task = Callable[[random.Random, str], Conversation]

SINGLE: dict[str, Callable[[random.Random, str], Turn]] = {
    "add": tasks_number.add,
    "subtract": tasks_number.subtract,
    "multiply": tasks_number.multiply,
    "compare": tasks_number.compare,
    "sort": tasks_number.sort,
    "reverse": tasks_word.reverse,
    "spell": tasks_word.spell,
    "count": tasks_word.count,
    "length": tasks_word.length,
    "weekday": tasks_date.weekday,
    "month": tasks_date.month,
    "month_length": tasks_date.month_length,
    "day_of_year": tasks_date.day_of_year,
    "date_after": tasks_date.date_after,
    "cannot": tasks_chat.cannot,
}
CHAINS: dict[str, Callable[[random.Random, str], list[Turn]]] = {
    "number_chain": tasks_number.number_chain,
    "word_chain": tasks_word.word_chain,
    "recall_twice": tasks_recall.recall_twice,
    "missing_fact": tasks_recall.missing_fact,
    "note": tasks_recall.note,
    "small_talk": tasks_chat.small_talk,
}
TASK_WEIGHTS: dict[str, float] = {
    "add": 14,
    "subtract": 14,
    "multiply": 8,
    "compare": 5,
    "sort": 6,
    "reverse": 5,
    "spell": 3,
    "count": 4,
    "length": 2,
    "weekday": 4,
    "month": 2,
    "month_length": 1,
    "day_of_year": 2,
    "date_after": 3,
    "cannot": 2,
    "number_chain": 7,
    "word_chain": 3,
    "recall_twice": 2,
    "missing_fact": 1,
    "note": 1,
    "small_talk": 3,
    "recall": 6,
    "mixed": 4,
}
EASY = ("spell", "month", "cannot", "small_talk", "note", "recall")  # answered without thinking now and then
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Ring-nano.",
    "You are Ring-nano, a toy model.",
    "Answer briefly.",
    "Think step by step.",
)


def _task(name: str) -> Task:
    """Turn a maker of turns into one of conversations."""
    if name in SINGLE:
        return lambda rng, split: conversation(name, [SINGLE[name](rng, split)])
    return lambda rng, split: conversation(name, CHAINS[name](rng, split))


def _mixed(rng: random.Random, split: str) -> Conversation:
    """Draw two or three unrelated questions in one conversation."""
    names = rng.choices(tuple(SINGLE), [TASK_WEIGHTS[name] for name in SINGLE], k=rng.choice((2, 2, 3)))
    return conversation("mixed", [SINGLE[name](rng, split) for name in names])


TASKS: dict[str, Task] = {name: _task(name) for name in (*SINGLE, *CHAINS)}
TASKS |= {"recall": tasks_recall.recall, "mixed": _mixed}


def make(task: str, rng: random.Random, split: str) -> Conversation:
    """Draw one conversation of a task from ``train`` or ``test``."""
    return TASKS[task](rng, split)


def stream(seed: int, split: str = "train", weights: Mapping[str, float] | None = None) -> Iterator[Conversation]:
    """Draw conversations without end.

    One in twelve has a system message; of the easy tasks one in eight has no thinking, for prompts that close it.

    Args:
        seed: The same seed gives the same conversations.
        split: ``train`` or ``test``.
        weights: Relative frequency of each task, `TASK_WEIGHTS` by default.
    """
    rng = random.Random(seed)
    weights = TASK_WEIGHTS if weights is None else weights
    names = tuple(weights)
    while True:
        for name in rng.choices(names, tuple(weights.values()), k=256):
            yield _vary(rng, TASKS[name](rng, split))


def _vary(rng: random.Random, drawn: Conversation) -> Conversation:
    messages = drawn.messages
    if drawn.task in EASY and rng.random() < 1 / 8:
        messages = (*messages[:-1], replace(messages[-1], thinking=""))
    if rng.random() < 1 / 12:
        messages = (Message("system", rng.choice(SYSTEM_PROMPTS)), *messages)
    return drawn if messages is drawn.messages else replace(drawn, messages=messages)


def eval_suite(
    n_per_task: int,
    seed: int,
    count_tokens: CountTokens = approximate_tokens,
    recall_tokens: Sequence[int] = (256, 1024, 2048, 4096),
    topic_tokens: Sequence[int] = (1024, 4096),
) -> list[Conversation]:
    """Draw held-out conversations of every task; recall at each length, as tasks ``recall-256``, ``topic-1024`` and so on.

    Args:
        n_per_task: How many of each.
        seed: The same seed gives the same suite.
        count_tokens: Number of tokens of a text; decides how long the recall conversations are.
        recall_tokens: Their lengths; their facts are placed evenly from first to last.
        topic_tokens: Lengths of those whose facts are told under headings.
    """
    rng = random.Random(seed)
    suite = [make(task, rng, "test") for task in TASKS if task != "recall" for _ in range(n_per_task)]
    for length in recall_tokens:
        for i in range(n_per_task):
            drawn = make_recall(rng, "test", length, count_tokens, depth=i / max(1, n_per_task - 1))
            suite.append(replace(drawn, task=f"recall-{length}"))
    for length in topic_tokens:
        for _ in range(n_per_task):
            drawn, _ = make_topic_recall(rng, "test", length, count_tokens, 1)
            suite.append(replace(drawn, task=f"topic-{length}"))
    return suite
