"""Standard streams that are closed, full or read by nobody: an exit code, at most one line, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout

import pytest

from ring_mlx.cli import main, streams
from ring_mlx.system.terminal_text import note
from tests.test_written_files import short_files

COMMANDS = [["--help"], ["--version"], [], ["generate", "--help"], ["cache", "info"], ["cache", "info", "--json"]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RING_MLX_CACHE", str(tmp_path / "cache"))


@contextmanager
def output(tmp_path):
    """Standard output is a file, flushed at the end as Python does."""
    with (tmp_path / "out").open("w") as f, redirect_stdout(f):
        yield f


def code_of(args):
    try:
        return main(args)
    except SystemExit as e:
        return e.code


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line(tmp_path, capsys, args):
    with output(tmp_path), short_files(0):
        assert code_of(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ring-mlx: [file] standard output, or a file, could not be read or written (File too large)")


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_pipe_that_nobody_reads_is_silence(tmp_path, capsys, args):
    reader, writer = os.pipe()
    os.close(reader)
    with output(tmp_path) as out:
        os.dup2(writer, out.fileno())
        os.close(writer)
        assert code_of(args) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_closed_streams_are_nothing(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, None)
        assert code_of(["--version"]) == 0
        getattr(sys, name).close()


def test_no_file_takes_the_place_of_a_closed_stream():
    lines = ["import os", "os.closerange(0, 3)", "from ring_mlx.cli import streams", "streams.replace_closed()"]
    lines.append("raise SystemExit(os.open(os.devnull, 0))")
    code = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode
    assert code == 3


def test_what_is_said_beside_the_output_may_be_lost(tmp_path, monkeypatch):
    with (tmp_path / "err").open("w", buffering=1) as f, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", f)
        with short_files(0):
            note("lost")
            streams.give_up_unwritable()
