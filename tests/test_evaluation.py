"""Suites and the eval command: answers extracted, batched and counted rightly; the packaged toy asked for real."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import mlx.core as mx
import pytest

from demo.suite import write_suite
from ring_mlx import demo_model_path, load
from ring_mlx.cli import main
from ring_mlx.cli.eval_command import mean_accuracy, select
from ring_mlx.convert import report
from ring_mlx.errors import OptionError, PromptError
from ring_mlx.evaluation import Result, accuracy_by_task, complete, evaluate
from ring_mlx.evaluation.answers import _batches
from ring_mlx.evaluation.needles import sentences_of
from ring_mlx.evaluation.perplexity import read_text
from ring_mlx.evaluation.suite import Question, read_suite, suite_path
from ring_mlx.generation.decoding import generate_step
from ring_mlx.model.model import Model
from tests.tiny import make_model, tokens

SUMS = [
    Question("add", ({"role": "user", "content": f"What is {a} + {b}?"},), str(a + b)) for a, b in ((27, 35), (4, 5))
]


def test_the_packaged_suite_is_what_the_demo_writes(tmp_path):
    assert write_suite(tmp_path / "suite.gz") == len(read_suite(suite_path("demo")))
    written, packaged = (p.read_bytes() for p in (tmp_path / "suite.gz", suite_path("demo")))
    assert gzip.decompress(written) == gzip.decompress(packaged)


def test_a_batch_completes_as_each_prompt_alone():
    model = make_model()
    prompts = [tokens(n, seed=n)[0].tolist() for n in (3, 11, 7)]
    alone = [[t for t, _ in generate_step(p, model, model.make_cache(), max_tokens=9)] for p in prompts]
    assert complete(model, prompts, 9, stop=()) == alone
    stop = {alone[1][4]}
    expected = [ids[: next((i for i, t in enumerate(ids) if t in stop), 9)] for ids in alone]
    assert complete(model, prompts, 9, stop) == expected


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    model, rows, call = make_model(), [], Model.__call__
    prompts = [tokens(n, seed=n)[0].tolist() for n in (3, 11, 7)]
    stop = {complete(model, prompts, 5, stop=())[1][4]}
    monkeypatch.setattr(Model, "__call__", lambda *a, **k: rows.append(len(a[1])) or call(*a, **k))
    complete(model, prompts, 9, stop)
    assert rows[:5] == [3] * 5
    assert max(rows[5:]) < 3


def test_results_keep_the_order_of_the_questions(chat):
    model, tokenizer = chat
    questions = [Question(str(i), ({"role": "user", "content": "hi " * i},), "x") for i in (5, 1, 3)]
    seen = []
    results = evaluate(model, tokenizer, questions, max_tokens=3, batch_size=2, progress=lambda *a: seen.append(a))
    assert [r.question.task for r in results] == ["5", "1", "3"]
    assert [s[:3] for s in seen] == [(0, 3, ""), (2, 3, "0 right"), (2, 3, "0 right"), (3, 3, "0 right")]
    assert seen[-1][3] == 0


def test_batches_hold_prompts_of_like_length_and_come_in_turn():
    lengths = [20, 30, 25, 40, 1000, 1100, 4000, 22]
    batches = _batches([[0] * n for n in lengths], 3)
    assert [[lengths[i] for i in part] for part in batches] == [[20, 22, 25], [1000, 1100], [30, 40], [4000]]
    assert _batches([[0]], 4) == [[0]]


def test_counts_and_mean():
    results = [Result(Question(t, (), "1"), "", given) for t, given in (("a", "1"), ("a", "2"), ("b", "1"))]
    counts = accuracy_by_task(results)
    assert counts == {"a": (1, 2), "b": (1, 1)}
    assert mean_accuracy(counts) == 0.75


def test_select():
    questions = [Question(t, (), str(i)) for i, t in enumerate("aabba")]
    assert [q.answer for q in select(questions, None, 1)] == ["0", "2"]
    assert [q.answer for q in select(questions, ["a"], 2)] == ["0", "1"]
    with pytest.raises(OptionError, match="'c' is not in the suite; it has a, b"):
        select(questions, ["c"], None)


ROW = {"task": "t", "messages": [{"role": "user", "content": "x"}], "answer": "y"}
BROKEN = {
    "not gzip": b"not gzip",
    "a broken stream": gzip.compress(json.dumps(ROW).encode() * 50)[:40] + b"\xff" * 60,
    "cut": gzip.compress(json.dumps(ROW).encode())[:-9],
    "nested": gzip.compress(b"[" * 200_000),
    "long": gzip.compress(b" " * 33_000_000, 1),
    **{text: gzip.compress(text.encode()) for text in ("{}", "[1]", "{", "1", '"x"', "null", "9" * 6000)},
    **{
        f"{name} {value}": gzip.compress(json.dumps(ROW | {name: value}).encode())
        for name, values in {
            "task": (None, 5, [1], {}),
            "answer": (None, 5),
            "messages": (
                None,
                "x",
                {"a": 1},
                [1],
                [{}],
                [{"role": 5, "content": "x"}],
                [{"role": "user", "content": []}],
            ),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_suite_is_one_line(tmp_path, capsys, name):
    path = tmp_path / "suite.gz"
    path.write_bytes(BROKEN[name])
    assert main(["eval", "--suite", str(path)]) == 2
    assert re.fullmatch(rf"ring-mlx: \[option\] suite {path} cannot be read [^\n]*\n", capsys.readouterr().err)


def test_a_suite_without_questions_is_one_line(tmp_path):
    (tmp_path / "suite.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(OptionError, match="has no question"):
        read_suite(tmp_path / "suite.gz")


def test_a_question_longer_than_the_context_is_refused(chat):
    long = Question("t", ({"role": "user", "content": "word " * 5000},), "x")
    with pytest.raises(PromptError, match="exceed the context of 2048"):
        evaluate(*chat, [SUMS[0], long], max_tokens=2)


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/zero", "x" * 300, "~nobody-of-that-name/x", "a\0b", "long"])
@pytest.mark.parametrize(
    "read",
    [
        read_suite,
        lambda path: read_text(path, "--perplexity"),
        sentences_of,
        report.read_text,
    ],
)
def test_what_is_no_text_is_one_line_and_waited_for_by_none(tmp_path, read, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "long").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(OptionError, match=r"^[^\n]* cannot be read [^\n]*$"):
        read(Path(name) if name[0] in "/~" else tmp_path / name)


def test_an_unknown_suite_names_those_there_are():
    with pytest.raises(OptionError, match="no suite 'nope'; give demo or"):
        suite_path("nope")


def test_the_command_prints_a_table_or_json(capsys, tmp_path):
    suite = tmp_path / "sums.gz"
    lines = [json.dumps({"task": q.task, "messages": q.messages, "answer": q.answer}) for q in SUMS]
    suite.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert main(["eval", "--suite", str(suite), "--limit", "1"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == ["add    100.0%  1 of 1", "mean   100.0%  of 1 tasks"]
    assert main(["eval", "--suite", str(suite), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == {"add": {"right": 2, "asked": 2}}


def test_the_toy_adds_in_a_thought_and_then_answers():
    model, tokenizer = load(demo_model_path())
    for r in evaluate(model, tokenizer, SUMS, max_tokens=80):
        assert r.right
        assert "</think>" in r.text
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
