"""The harness sees what it is there to see."""

from __future__ import annotations

import signal

import pytest

from tests.fuzz import server
from tests.fuzz.outcome import Outcome
from tests.fuzz.server import attempt

DOORS = "tests.fuzz.doors:"


def test_success(forks):
    assert attempt(forks, f"{DOORS}cli", ["--version"]).out.startswith("ring-mlx ")


def test_one_line(forks):
    outcome = attempt(forks, f"{DOORS}cli", ["generate", "--model", "/no/such", "--prompt", "hi"])
    assert outcome.code == 2
    assert outcome.err.startswith("ring-mlx: [hub] ")


@pytest.mark.parametrize(
    ("door", "args", "seen"),
    [
        ("trace", [], "traceback, exit code 99"),
        ("hog", [1500], "1"),
        ("hog", [9000], "traceback"),
        ("die", [int(signal.SIGSEGV)], f"signal {int(signal.SIGSEGV)}"),
        ("chatter", [], "more than the command's own lines"),
    ],
)
def test_planted_faults_are_seen(forks, door, args, seen):
    outcome = forks.call(f"{DOORS}{door}", *args)
    assert outcome.wrong is not None
    assert seen in outcome.wrong
    with pytest.raises(AssertionError):
        attempt(forks, f"{DOORS}{door}", *args)


@pytest.mark.parametrize(("door", "limit"), [("wait", "WALL_S"), ("spin", "KILLED_BY_CPU")])
def test_a_hang_is_seen(monkeypatch, door, limit):
    """With the processor's time running or not; the limit is short here."""
    monkeypatch.setattr(server, limit, 1)
    found = server._run(f"{DOORS}{door}", [], "")
    assert found["code"] == -signal.SIGKILL
    assert Outcome(**found).wrong is not None


def test_a_lost_server_is_started_again(forks):
    attempt(forks, f"{DOORS}cli", ["--version"])
    forks._process.kill()
    forks._process.wait()
    attempt(forks, f"{DOORS}cli", ["--version"])
