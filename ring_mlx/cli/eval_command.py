"""``ring-mlx eval``: how many questions of a suite a model answers rightly."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ring_mlx.cli import options
from ring_mlx.errors import OptionError

if TYPE_CHECKING:
    from ring_mlx.suite import Question


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "eval", help="accuracy on a suite of questions", description=__doc__, allow_abbrev=False
    )
    options.add_model_options(parser)
    parser.add_argument("--suite", default="demo", help="demo, or a gzipped JSON-lines file (demo)")
    parser.add_argument("--task", action="append", help="only this task of the suite; may be given again")
    parser.add_argument("--limit", type=options.positive_int, help="only so many questions of each task")
    parser.add_argument("--max-tokens", "-m", type=options.positive_int, default=400, help="of an answer (400)")
    parser.add_argument("--batch-size", type=options.positive_int, default=16, help="questions at a time (16)")
    parser.add_argument("--show-wrong", action="store_true", help="print each wrong answer beside the right one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask the suite and print the table; returns the exit code."""
    from ring_mlx.evaluation import accuracy_by_task, evaluate
    from ring_mlx.suite import read_suite, suite_path

    questions = select(read_suite(suite_path(args.suite)), args.task, args.limit)
    model, tokenizer, name = options.load_named(args)
    started = time.perf_counter()
    with tqdm(total=len(questions), desc="questions", leave=False, disable=None, file=sys.stderr) as bar:
        results = evaluate(
            model,
            tokenizer,
            questions,
            max_tokens=args.max_tokens,
            batch_size=args.batch_size,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    counts = accuracy_by_task(results)
    if args.json:
        tasks = {task: {"right": right, "asked": asked} for task, (right, asked) in counts.items()}
        print(json.dumps({"model": name, "suite": args.suite, "mean": mean_accuracy(counts), "tasks": tasks}))
        return 0
    if args.show_wrong:
        for r in (r for r in results if not r.right):
            print(f"{r.question.task}: {r.given!r} instead of {r.question.answer!r}")
    width = max(len("mean"), *map(len, counts))
    for task, (right, asked) in counts.items():
        print(f"{task:{width}}  {right / asked:7.1%}  {right} of {asked}")
    print(f"{'mean':{width}}  {mean_accuracy(counts):7.1%}  of {len(counts)} tasks")
    print(f"{len(results)} questions in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


def select(questions: list[Question], tasks: list[str] | None, limit: int | None) -> list[Question]:
    """The questions of the named tasks, at most ``limit`` of each.

    Raises:
        OptionError: If the suite has no such task.
    """
    known = dict.fromkeys(q.task for q in questions)
    for task in tasks or ():
        if task not in known:
            raise OptionError(f"--task {task!r} is not in the suite; it has {', '.join(known)}.")
    taken = dict.fromkeys(known, 0)
    chosen = []
    for q in questions:
        if (not tasks or q.task in tasks) and (limit is None or taken[q.task] < limit):
            taken[q.task] += 1
            chosen.append(q)
    return chosen


def mean_accuracy(counts: dict[str, tuple[int, int]]) -> float:
    """Mean over tasks, each counting the same."""
    return sum(right / asked for right, asked in counts.values()) / len(counts)
