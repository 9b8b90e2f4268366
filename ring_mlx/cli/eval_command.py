"""``ring-mlx eval``: a suite's questions, perplexity, divergence from another model, recall from long texts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path, load_model
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.cli import from_options
from ring_mlx.cli.eval_options import QUICK_LIMIT
from ring_mlx.cli.progress import bar_of
from ring_mlx.errors import OptionError
from ring_mlx.evaluation import accuracy_by_task, divergence, evaluate, perplexity
from ring_mlx.evaluation.divergence import check_both_fit, check_same_tokens
from ring_mlx.evaluation.heat_map import check_plot, plot
from ring_mlx.evaluation.needles import sentences_of
from ring_mlx.evaluation.perplexity import read_text
from ring_mlx.evaluation.recall import recall, table
from ring_mlx.evaluation.suite import Question, is_packaged, read_suite, suite_path
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import for_output, harmless_json, note
from ring_mlx.system.wired import Wired


def run(args: argparse.Namespace) -> int:
    """Make the requested measurements and print them; returns the exit code."""
    # What is read or checked before a model is loaded, which may take long.
    measurements = [prepare(args) for name, prepare in PREPARE.items() if getattr(args, name) is not None]
    model, tokenizer, name = from_options.load_named(args)
    found: dict[str, Any] = {"model": name}
    with Wired():
        for measure in measurements:
            found |= measure(model, tokenizer)
    if args.json:
        print(harmless_json(found))
    return 0


Measurement = Callable[[Model, TokenizerWrapper], dict[str, Any]]


def _prepare_suite(args: argparse.Namespace) -> Measurement:
    if args.limit is None and not args.full and is_packaged(args.suite):
        args.limit = QUICK_LIMIT
    questions = select(read_suite(suite_path(args.suite)), args.task, args.limit)
    return partial(_measure_suite, args, questions)


def _measure_suite(
    args: argparse.Namespace, questions: list[Question], model: Model, tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    started = time.perf_counter()
    with bar_of(args, "suite", "questions") as progress:
        results = evaluate(
            model, tokenizer, questions, max_tokens=args.max_tokens, batch_size=args.batch_size or 16, progress=progress
        )
    found = accuracy_by_task(results)
    if empty := sum(r.is_empty for r in results):
        note(
            f"[eval] {empty} of {len(results)} answers are empty or all thought; raise --max-tokens, or change the prompt."
        )
    if not args.json:
        if args.show_wrong:
            for r in (r for r in results if not r.right):
                print(for_output(f"{r.question.task}: {r.given!r} instead of {r.question.answer!r}"))
        width = max(len("mean"), *map(len, found))
        for task, (right, asked) in found.items():
            print(for_output(f"{task:{width}}  {right / asked:7.1%}  {right} of {asked}"))
        print(f"{'mean':{width}}  {mean_accuracy(found):7.1%}  of {len(found)} tasks")
        limit = "" if args.limit is None else f", at most {args.limit} of a task (--full asks all)"
        print(f"{len(results)} questions in {time.perf_counter() - started:.0f} s{limit}", file=sys.stderr)
    cut_off = sum(r.is_cut_off for r in results)
    if cut_off:
        note(f"[eval] {cut_off} answers were cut off and are judged as they are; raise --max-tokens, or leave it out.")
    tasks = {task: {"right": right, "asked": asked} for task, (right, asked) in found.items()}
    return {"suite": args.suite, "limit": args.limit, "mean": mean_accuracy(found), "cut_off": cut_off, "tasks": tasks}


def _prepare_text(args: argparse.Namespace) -> Measurement:
    return partial(_measure_text, args, read_text(args.perplexity, "--perplexity"))


def _measure_text(args: argparse.Namespace, text: str, model: Model, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    ids = perplexity.encode(text, tokenizer, f"--perplexity {args.perplexity}")
    context = model.config.context_tokens
    reference = None if args.kl is None else _reference(args, model, tokenizer, text)
    if reference is not None:
        context = min(context, reference.config.context_tokens)
    window, stride = perplexity.window_of(context, args.window, args.stride, len(ids))
    if reference is None:
        with bar_of(args, "perplexity", "tokens") as progress:
            found = perplexity.perplexity(model, ids, window, stride, progress)
        if not args.json:
            print(perplexity.table(found))
        return {"perplexity": {"file": str(args.perplexity), **asdict(found)}}
    with bar_of(args, "divergence", "tokens") as progress:
        both = divergence.diverge(model, reference, ids, window, stride, progress)
    if not args.json:
        print(for_output(divergence.table(both, args.kl)))
    where = {"file": str(args.perplexity), "reference": args.kl, "window": window, "stride": stride}
    return {"kl": where | asdict(both)}


def _reference(args: argparse.Namespace, model: Model, tokenizer: TokenizerWrapper, text: str) -> Model:
    """The model of --kl, loaded beside the one that is measured."""
    with bar_of(args, "downloading the reference", "B") as bar:
        folder = resolve_model(args.kl, progress=bar)
    check_same_tokens(tokenizer, load_tokenizer(folder), text, args.kl)
    check_both_fit(model, folder)
    with bar_of(args, "loading the reference") as bar:
        return load_model(folder, exact=args.exact, progress=bar)


def _prepare_recall(args: argparse.Namespace) -> Measurement:
    if args.plot is not None:
        check_plot(args.plot)
    filler = None if args.filler is None else sentences_of(args.filler)
    return partial(_measure_recall, args, filler)


def _measure_recall(
    args: argparse.Namespace, filler: Iterator[str] | None, model: Model, tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    with bar_of(args, "recall", "questions") as progress:
        grid = recall(
            model,
            tokenizer,
            args.recall,
            args.depths or 5,
            needles=args.needles or 3,
            max_tokens=args.max_tokens,
            filler=filler,
            seed=args.seed or 0,
            progress=progress,
        )
    if not args.json:
        print(table(grid))
    if args.plot is not None:
        plot(grid, f"{Path(args.model or demo_model_path()).name}: facts recalled", args.plot)
    return {"recall": asdict(grid)}


PREPARE = {"suite": _prepare_suite, "perplexity": _prepare_text, "recall": _prepare_recall}


def select(questions: list[Question], tasks: list[str] | None, limit: int | None) -> list[Question]:
    """The questions of the named tasks, at most ``limit`` of each; raises OptionError if there is no such task."""
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
