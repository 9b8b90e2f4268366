"""`ring-mlx launch`: what it starts, how it ends, what it says once for all ranks, and the hosts it refuses."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from ring_mlx import demo_model_path
from ring_mlx.bench.run import COLUMNS
from ring_mlx.cli import main
from ring_mlx.cli.exit_codes import CUT_OFF
from ring_mlx.distributed import heartbeat, hosts, probe
from ring_mlx.distributed.failure import DistributedError
from tests.test_distributed import ROOT, free_ports, refusal, running


def test_launch_ends_with_an_error_when_a_rank_is_killed(tmp_path):
    port, _ = free_ports(2)
    mark = f"count {port}"
    stops = json.dumps(dict.fromkeys(map(str, range(16)), -1000))
    command = [
        *(sys.executable, "-m", "ring_mlx", "launch", "-n", "2", "--starting-port", str(port), "--no-check"),
        *("generate", "--prompt", mark, "--max-tokens", "5000", "--logit-bias", stops, "--verbose", "F"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(1)
        pids = [pid for pid, text in running() if mark in text and " launch " not in text and "mlx.launch" not in text]
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        started = time.monotonic()
        _, said = p.communicate(timeout=30)
        assert time.monotonic() - started < 10
    assert p.returncode != 0
    assert b"is gone" in said or b"was killed" in said or b"exited with code" in said or b"lost" in said


def test_auto_falls_back_to_a_pipeline_and_says_why(chat_folder, capfd):
    port, _ = free_ports(2)
    words = ["launch", "-n", "2", "--starting-port", str(port), "generate", "--model", str(chat_folder), "-m", "3"]
    assert main([*words, "--json"]) == CUT_OFF  # of the answer: no rank has failed, and none is said to have
    out, err = capfd.readouterr()
    assert json.loads(out)["generation_tokens"] == 3
    assert err.count("cut off after 3 tokens") + err.count("all 3 tokens were thought") == 1
    assert "ended with exit code" not in err
    assert err.count("group_norm_size 3 does not divide among 2 ranks") == 1
    assert "A pipeline is used instead." in err


def launched(capfd, *words, size=2):
    """Exit code, output and error lines of a command in several processes here, not asked first."""
    port = free_ports(size)[0]
    code = main(["launch", "-n", str(size), "--starting-port", str(port), "--no-check", *map(str, words)])
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if " note: " not in line]


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_a_benchmark_of_two_processes_is_printed_and_written_once(tmp_path, capfd, mode):
    file, words = tmp_path / "x.csv", ("-p", 6, "-g", 2, "-n", 1, "--batch-size", "1,2")
    code, out, err = launched(capfd, "bench", "--random", "golden", "--distributed", mode, *words, "--csv", file)
    assert (code, err) == (0, [])
    assert out.count("ring-mlx ") == 3  # versions and two cells
    assert f"golden, random unquantized weights, {mode} over 2 processes: " in out
    with file.open() as f:
        rows = list(csv.DictReader(f))
    assert [(r["ranks"], r["distributed"], r["batch"], r["runs"]) for r in rows] == [
        ("2", mode, "1", "1"),
        ("2", mode, "2", "1"),
    ]
    assert all(float(r["decode_tps_median"]) > 0 and float(r["peak_gb"]) > 0 for r in rows)


def test_a_benchmark_refuses_in_one_line_for_all_ranks(tmp_path, capfd):
    code, out, err = launched(capfd, "bench", "--vs", "mlx-lm")
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("ring-mlx: [option] --vs does not work in several processes: mlx-lm would need the whole")
    old = tmp_path / "old.csv"
    old.write_text(",".join(COLUMNS[:-3]) + "\n")
    code, out, err = launched(capfd, "bench", "-p", 6, "--csv", old)
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert "it lacks ranks, distributed" in err[0]
    assert old.read_text().count("\n") == 1


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ssh that knows some hosts, and what the first says."""
    said = probe.probe(None)
    other = said["versions"] | {"mlx": "0.1.0"}
    answers = {
        "good": json.dumps(said),
        "old": json.dumps(said | {"versions": other}),
        "finetuned": json.dumps(said | {"weights": "0123456789"}),
        "empty": json.dumps(said | {"error": "[hub] no folder x; download it."}),
    }
    script = ["#!/bin/sh", 'while [ "$1" != -- ]; do shift; done', 'case "$2" in']
    script += [f"{name}) echo '{answer}';;" for name, answer in answers.items()]
    script += ["bare) echo 'python: not found' >&2; exit 127;;", "*) echo 'timed out' >&2; exit 255;;", "esac"]
    file = tmp_path / "bin" / "ssh"
    file.parent.mkdir()
    file.write_text("\n".join(script) + "\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("old", r"rank 1 \(old\) has mlx 0\.1\.0, rank 0 \(good\) 0\.\d+\.\d+; install the same\."),
        ("finetuned", r"rank 1 \(finetuned\) has other weights than rank 0 \(good\)"),
        ("empty", r"host empty: \[hub\] no folder x"),
        ("bare", r"host bare: .* failed there \(python: not found\)"),
        ("off", r"host off: not reachable \(timed out\); see that `ssh off` works"),
    ],
)
def test_a_host_that_is_unfit_is_named(ssh, name, why, capsys):
    assert main(["launch", "--hosts", f"good=10.0.0.1,{name}=10.0.0.2", "generate"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(DistributedError, match=why):
        hosts.check_hosts(hosts.parse_hosts(f"good=10.0.0.1,{name}=10.0.0.2", 1), "python", None, None)


def test_hosts_and_their_file(tmp_path, ssh):
    chosen = hosts.parse_hosts("good=10.0.0.1,good=10.0.0.2", 1)
    hosts.check_hosts(chosen, "python", None, None)
    path = tmp_path / "hosts.json"
    assert main(["launch", "--hosts", "good=10.0.0.1,good=10.0.0.2", "--write-hostfile", str(path)]) == 0
    assert hosts.read_host_file(path)[0] == chosen
    for text in ("a=10.0.0.1,localhost", "a=10.0.0.1", "a=10.0.0.1,", "no.such.host.invalid,a=10.0.0.1"):
        with pytest.raises(DistributedError):
            hosts.parse_hosts(text, 1)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["launch", "-n", "2", "chat"], "chat does not run in several processes; give generate, bench or serve."),
        (["bench", "--distributed", "tensor"], "needs several processes"),
        (["serve", "--distributed", "pipeline"], "needs several processes"),
        (["launch", "-n", "2"], "no command given"),
        (["launch", "--hostfile", "/nowhere", "generate"], "is not a host file"),
        (["launch", "--hostfile", "/dev/zero", "generate"], "it is not a plain file"),
        (["launch", "-n", "100000", "generate"], "100000 processes are more than 256"),
        (["generate", "--distributed", "tensor"], "needs several processes"),
    ],
)
def test_bad_input_is_one_line(words, why, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert why in err
    assert len(err.splitlines()) == 1


# An interpreter whose rank 0 is slow to tell the others that it fails, and to say why.
LATE = """#!{python}
import os, sys, time
from ring_mlx.cli import main
from ring_mlx.distributed import boot
from ring_mlx.distributed.heartbeat import RankHeartbeat
fail = RankHeartbeat.fail
def late(self):
    if self.rank == 0:
        time.sleep(4.5)
    fail(self)
    if self.rank == 0:
        time.sleep(2.5)
RankHeartbeat.fail = late
sys.exit(boot.main() if sys.argv[3] == boot.__name__ else main(sys.argv[4:]))
"""


@pytest.mark.parametrize(("interpreter", "size"), [pytest.param("own", 4, marks=pytest.mark.slow), ("late", 2)])
def test_launch_refuses_in_one_line_for_all_ranks(interpreter, size, tmp_path, capfd, chat_folder):
    late = tmp_path / "late"
    late.write_text(LATE.format(python=sys.executable))
    late.chmod(0o755)
    python = ("--python", late) if interpreter == "late" else ()
    folder = {4: demo_model_path(), 2: chat_folder}[size]
    words = ("generate", "--model", folder, "--distributed", "tensor")
    code, out, err = launched(capfd, *python, *words, size=size)
    assert (code, out, err) == (2, "", [f"ring-mlx: {refusal(size, folder)}"])


def test_a_heartbeat_that_wakes_late_takes_nobody_for_silent(monkeypatch):
    ours, theirs = socket.socketpair()
    real, ended = heartbeat.select.select, []

    def late(read, *_):
        found = real(read, [], [], 0)
        if not found[0]:
            time.sleep(1.5)  # as where another thread keeps the interpreter's lock
        return found

    monkeypatch.setattr(heartbeat, "SILENT_S", 1.0)
    monkeypatch.setattr(heartbeat, "select", types.SimpleNamespace(select=late))
    monkeypatch.setattr(heartbeat.RankHeartbeat, "_end", lambda _, *why: ended.append(why))
    w = heartbeat.RankHeartbeat(0, {1: ours}, "ab")
    with ours, theirs:
        for _ in range(12):
            theirs.send(heartbeat.BEAT)
            time.sleep(0.4)
        w._closing.set()
        w._thread.join(10)
    assert ended == []
