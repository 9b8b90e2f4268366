"""What `--speculate auto` gains with the toy where several answers are given at once: ``python -m benchmarks.speculation_rows``.

Rows of a batch give the answers of a task of `benchmarks.speculation_tasks`, or of all tasks, one after the other; a row that ends
makes room for the next. The seconds of all answers: plain, and with drafts, in alternation. Prompts are read before. "nothing
right" has drafts of which none ever comes true: what the gate then costs. The pace is kept from round to round, as in a server.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from benchmarks.common import arguments, report
from benchmarks.speculation_tasks import TASKS, Answer, answers
from ring_mlx import demo_model_path, load
from ring_mlx.generation.batch import Batch
from ring_mlx.generation.draft_sources import DraftSource, PromptDrafts
from ring_mlx.generation.drafts import Counts, Draft, Drafter
from ring_mlx.generation.pace import Pace
from ring_mlx.model.model import Model

ALL, NOTHING = "all of them", "nothing right"


class Wrong:
    """A source of drafts that never come true: of token 0, which no answer has."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def drafter(self, tokens: Sequence[int]) -> Wrong:
        return self

    def take_back(self, drafter: Drafter) -> None:
        """There is nothing to keep."""

    def add(self, token: int) -> None:
        assert token

    def draft(self, most: int) -> Draft:
        return Draft([0] * most, 3)


def seconds(
    model: Model, found: Sequence[Answer], rows: int, drafts: DraftSource | None
) -> tuple[float, float, int, list[Counts]]:
    """By the clock and of the processor to give all answers, so many at once; the steps, and what was drafted."""
    batch, waiting, said, counts = Batch(model), deque(found), {}, []
    steps, began = 0, (time.perf_counter(), time.process_time())
    while waiting or said:
        while waiting and len(said) < rows:
            answer = waiting.popleft()
            how = {**answer.options(), "logits": answer.logits, "history": answer.ids}
            number = batch.add([], cache=answer.cache.copy(), drafts=drafts, **how)
            said[number] = answer, []
            counts.append(batch.counts(number))
        steps += 1
        for number, token in batch.step().items():
            answer, tokens = said[number]
            tokens.append(token)
            if len(tokens) == len(answer.text):
                assert tokens == answer.text
                batch.remove(number)
                del said[number]
    return time.perf_counter() - began[0], time.process_time() - began[1], steps, counts


def row(model: Model, name: str, found: Sequence[Answer], rows: int, repeats: int) -> dict[str, Any]:
    """What was measured, the two ways in alternation."""
    pace, rounds, counts = Pace(), [], []
    for n in range(repeats + 1):
        source = Wrong(pace) if name == NOTHING else PromptDrafts(pace, is_shared=True)
        off = seconds(model, found, rows, None)
        on = seconds(model, found, rows, source)
        if n:
            rounds.append((off, on))
            counts += on[3]
    tokens = sum(len(answer.text) for answer in found)
    drafted, accepted = sum(c.drafted for c in counts), sum(c.accepted for c in counts)
    return {
        "task": name,
        "rows": rows,
        "tokens": tokens,
        "off tok/s": [tokens / off[0] for off, _ in rounds],
        "ratio": [off[0] / on[0] for off, on in rounds],
        "of processor": statistics.median(off[1] / on[1] for off, on in rounds),
        "accepted": accepted / drafted if drafted else 0.0,
        "of tokens": accepted / (tokens * repeats),
    }


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer at most (200)")
    parser.add_argument("--rows", type=int, action="append", help="at once; may be repeated (2 and 4)")
    parser.add_argument(
        "--task", choices=(*TASKS, ALL, NOTHING), action="append", help="only this one; may be repeated"
    )
    args = parser.parse_args()
    model, tokenizer = load(demo_model_path())
    own = {name: list(answers(model, tokenizer, name, args.tokens)) for name in TASKS}
    own[ALL] = own[NOTHING] = [answer for found in own.values() for answer in found]
    least = max(args.rows or (4,))
    table = (
        row(model, name, own[name] * -(-2 * least // len(own[name])), rows, args.repeats)
        for rows in args.rows or (2, 4)
        for name in args.task or own
    )
    report(args, table, "the toy")


if __name__ == "__main__":
    main()
