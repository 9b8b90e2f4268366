"""What long commands show while they work: a bar at a terminal, lines elsewhere, nothing where that is promised."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import re
import sys
import threading
import time

import pytest

from ring_mlx.cli import main, progress
from ring_mlx.cli.eval_options import QUICK_LIMIT
from ring_mlx.cli.progress import ProgressBar, bar_of
from ring_mlx.evaluation import Result
from ring_mlx.system.progress import LEAST_SHARE, TimeLeft
from ring_mlx.system.terminal_text import note, shown_bars
from tests.tiny import GOLDENS

GOLDEN = str(GOLDENS / "mini_like")
TIMES = r"\d+ s so far, about \d+ s left"


class Stream(io.StringIO):
    """Standard error that may be a terminal."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def error(monkeypatch):
    """Makes standard error a terminal or none, and progress impatient."""
    monkeypatch.delenv("RING_MLX_PROGRESS")
    for name in ("BAR_AFTER_S", "LINE_AFTER_S", "OF_THE_TIME"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(progress, "TICK_S", 0.005)
    monkeypatch.setenv("TERM", "xterm")

    def make(is_terminal):
        monkeypatch.setattr(sys, "stderr", Stream(is_terminal))
        return sys.stderr

    return make


def wait_for(stream, pattern):
    """Until the stream holds it; fails after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := re.search(pattern, stream.getvalue()):
            return found
        time.sleep(0.005)
    raise AssertionError(f"no {pattern} in {stream.getvalue()[-300:]!r}")


def test_lines_where_there_is_no_terminal(error):
    stream = error(is_terminal=False)
    with ProgressBar("suite", "questions") as bar:
        wait_for(stream, r"ring-mlx: suite: \d+ s so far\n")
        time.sleep(0.05)
        bar(3, 12, "2 right")
        wait_for(stream, rf"ring-mlx: suite: 3 of 12 questions, 2 right; {TIMES}\n")
        bar(3, 12, "2 right", 7200.0)
        wait_for(stream, r"so far, about 2 h 0 min left\n")
        bar(3, 12, "2 right", math.inf)
        wait_for(stream, r"2 right; \d+ s so far\n")
        bar(5e8, 2e9)
        bar._unit = "B"
        wait_for(stream, r"0.5 of 2.0 GB; ")
    assert "\r" not in stream.getvalue()


def test_a_bar_at_a_terminal_which_goes_away(error):
    stream = error(is_terminal=True)
    with ProgressBar("convert", "B") as bar:
        bar(1e6, 4e6, "a\x1b]0;owned\x07\u202e\nb", 50.0)
        wait_for(stream, rf" 0%\|.*\| convert: 1.0 of 4.0 MB, a.*; {TIMES}")
        bar(2e6, 4e6, "", 0.0)
        wait_for(stream, r" 99%\|.*\| convert: 2.0 of 4.0 MB; \d+ s so far *\r")
    said = stream.getvalue()
    assert r"a\x1b]0;owned\x07\u202e\nb" in said
    assert "\n" not in said
    assert re.search(r"\r *\r$", said)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_over_at_once_or_quiet_shows_nothing(error, monkeypatch, is_terminal):
    stream, threads = error(is_terminal), threading.active_count()
    with ProgressBar("x", quiet=True) as bar:
        bar(1, 2)
        assert threading.active_count() == threads
    monkeypatch.setattr(progress, "BAR_AFTER_S", 60.0)
    monkeypatch.setattr(progress, "LINE_AFTER_S", 60.0)
    with ProgressBar("x") as bar:
        time.sleep(0.05)
    assert stream.getvalue() == ""
    assert not shown_bars


def test_json_and_quiet_keep_their_promise(error):
    error(is_terminal=False)
    for options, is_quiet in (
        ({"quiet": True}, True),
        ({"quiet": False, "json": True}, True),
        ({"quiet": False, "json": False}, False),
        ({"quiet": False, "json": "file"}, False),
    ):
        assert bar_of(argparse.Namespace(**options), "x")._is_quiet == is_quiet
    error(is_terminal=True)
    assert not bar_of(argparse.Namespace(quiet=False, json=True), "x")._is_quiet
    assert bar_of(argparse.Namespace(quiet=False), "x", is_heard=False)._is_quiet


def test_a_terminal_that_cannot_go_back_gets_lines(error, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = error(is_terminal=True)
    with ProgressBar("x", "steps") as bar:
        bar(1, 2)
        wait_for(stream, r"ring-mlx: x: 1 of 2 steps; ")


def test_a_note_stands_on_a_line_of_its_own(error):
    stream = error(is_terminal=True)
    with ProgressBar("x", "steps") as bar:
        bar(1, 2)
        wait_for(stream, "1 of 2 steps")
        note("hello")
        wait_for(stream, r"\r *\rring-mlx: hello\n\r.*1 of 2 steps")


@pytest.mark.parametrize("error_class", [BrokenPipeError, ValueError])
def test_work_goes_on_where_nobody_hears_of_it(error, monkeypatch, error_class):
    stream, tried = error(is_terminal=False), threading.Event()

    def write(text):
        tried.set()
        raise error_class

    monkeypatch.setattr(stream, "write", write)
    with ProgressBar("x", "steps") as bar:
        assert tried.wait(60)
        bar._thread.join(60)
        bar(1, 2)
    assert not shown_bars


def test_what_was_entered_last_is_shown_and_begins_again(error):
    stream = error(is_terminal=False)
    with ProgressBar("outer") as outer:
        wait_for(stream, "outer")
        with ProgressBar("inner", "steps") as inner:
            inner(2, 2)
            time.sleep(0.02)
            before = stream.getvalue()
            time.sleep(0.05)
            assert stream.getvalue() == before
            inner(1, 4)
            wait_for(stream, "inner: 1 of 4 steps")
            assert "outer" not in stream.getvalue()[len(before) :]
        outer(1, 2)
        wait_for(stream, "outer: 0 s so far, about")


def test_each_kind_of_work_goes_at_its_own_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def did(kind, amount, seconds):
        now[0] += seconds
        time_left.did(kind, amount)

    time_left = TimeLeft(tokens=1000, answers=10)
    assert time_left.left_s() == math.inf
    did("tokens", 1000 * LEAST_SHARE / 2, 60)
    did("answers", 1, 3)
    assert time_left.left_s() == math.inf
    did("tokens", 490, 40)
    assert time_left.left_s() == pytest.approx(500 * 100 / 500 + 9 * 3)
    did("answers", 9, 1)
    did("tokens", 600, 1)
    assert time_left.left_s() == 0


@pytest.fixture
def told(monkeypatch):
    """What each bar was told, by its name."""
    found, call = {}, ProgressBar.__call__

    def listen(self, *args):
        found.setdefault(self._what, []).append(args)
        call(self, *args)

    monkeypatch.setattr(ProgressBar, "__call__", listen)
    enter = ProgressBar.__enter__
    monkeypatch.setattr(ProgressBar, "__enter__", lambda self: found.setdefault(self._what, []) is None or enter(self))
    return found


def is_whole(steps):
    """Counts that grow to their total."""
    done = [step[0] for step in steps]
    return len(steps) > 1 and done == sorted(done) and done[-1] == steps[-1][1]


def test_conversions_tell_how_far_they_are(told, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one two three\n\nfour five six seven\n")
    out = str(tmp_path / "out")
    assert main(["convert", "--model", GOLDEN, "--mlx-path", out, "--check-decay", "never", "--verify"]) == 0
    assert set(told) == {"convert", "verify"}
    assert is_whole(told["convert"])
    assert [step[0] for step in told["verify"]] == sorted(step[0] for step in told["verify"])
    assert main(["convert", "--model", GOLDEN, "--dry-run"]) == 0
    assert "reading" in told


def test_a_benchmark_tells_how_far_it_is(told, capsys):
    assert (
        main(["bench", "--random", "golden", "--layers", "5", "-p", "4,8", "-g", "2", "-n", "1", "--vs", "mlx-lm"]) == 0
    )
    assert is_whole(told["bench"])
    assert told["bench"][-1][:2] == (4, 4)
    assert told["bench"][-1][3] == 0
    assert "1 x 8 tokens, run 1" in told["bench"][-1][2]


def test_an_evaluation_tells_how_far_it_is(told, chat_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is 27 + 35? " * 20)
    arguments = ["--model", str(chat_folder), "--kl", str(chat_folder), "--perplexity", str(text), "--window", "20"]
    arguments += ["--suite", "demo", "--task", "add", "--limit", "2", "-m", "2", "--recall", "90", "--depths", "1"]
    assert main(["eval", *arguments]) == 0
    assert set(told) >= {"loading the model", "suite", "divergence", "loading the reference", "recall"}
    for what in ("loading the model", "loading the reference", "suite", "divergence", "recall"):
        assert is_whole(told[what]), what


def test_the_doctor_tells_how_far_it_is(told, chat_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ring_mlx.doctor.finding.CHECKS", {"versions": "versions", "disk": "disk"})
    assert main(["doctor"]) in (0, 1)
    assert told["doctor"] == [(0, 2, "versions"), (1, 2, "disk")]
    text = tmp_path / "text.txt"
    text.write_text("What is 27 + 35? " * 20)
    assert main(["doctor", "--check-decay", str(chat_folder), "--text", str(text), "--tokens", "64"]) in (0, 1)
    assert is_whole(told["loading the model"])
    assert is_whole(told["checking the decay"])


@pytest.fixture
def asked(monkeypatch):
    """How many questions an evaluation asks; no model is loaded."""
    found = []

    def evaluate(model, tokenizer, questions, **_):
        found.append(len(questions))
        return [Result(q, "", "") for q in questions]

    monkeypatch.setattr("ring_mlx.cli.eval_command.evaluate", evaluate)
    monkeypatch.setattr("ring_mlx.cli.from_options.load_named", lambda args: (None, None, "toy"))
    return found


def test_an_evaluation_is_short_unless_all_is_asked_for(asked, tmp_path, capsys):
    for options in ([], ["--limit", "3"], ["--full"]):
        assert main(["eval", *options]) == 0
    assert asked == [28 * QUICK_LIMIT, 28 * 3, 28 * 40]
    said = capsys.readouterr().err
    assert f"at most {QUICK_LIMIT} of a task (--full asks all)" in said
    row = {"task": "a", "messages": [{"role": "user", "content": "?"}], "answer": "1"}
    (tmp_path / "own.gz").write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode() * 50))
    assert main(["eval", "--suite", str(tmp_path / "own.gz")]) == 0
    assert asked[3] == 50
    assert main(["eval", "--full", "--limit", "2"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
