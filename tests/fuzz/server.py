"""A process that forks for each example: it has imported everything and run nothing of MLX, so a fork is clean."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.outcome import CPU_S, WALL_S, Outcome

ROOT = Path(__file__).parents[2]
# Where programs keep what is a person's own: commands that are fuzzed leave that alone.
HOMES = ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")
# Stops a call that would take the machine's memory, well after what the outcome allows.
MOST_BYTES = 4 << 30
KILLED_BY_CPU, UNFORESEEN, OUTPUT_BYTES = CPU_S + 2, 99, 1 << 20


class Forks:
    """The server, from the test's side; a lost one is started again.

    Args:
        environment: Variables that the server and its forks have.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._process: Any = None
        self._home = tempfile.TemporaryDirectory()
        self._lock = threading.Lock()

    def call(self, function: str, *args: Any, stdin: str = "") -> Outcome:
        """Run ``module:function(*args)`` in a fork; the arguments must be JSON."""
        with self._lock:
            process = self._started()
            print(json.dumps([function, args, stdin]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        assert answer, "the fuzz server ended"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        """End the server."""
        self._end()
        self._home.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.stdout.close()
            self._process = None

    def _started(self) -> Any:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            command = [sys.executable, "-m", "tests.fuzz.server"]
            pipe = subprocess.PIPE
            home = dict.fromkeys(HOMES, self._home.name)
            env = os.environ | home | {"PYTHONPATH": str(ROOT)} | self._environment
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=pipe, stdout=pipe)
        return self._process


def attempt(forks: Forks, function: str, *args: Any, stdin: str = "") -> Outcome:
    """`Forks.call`, which must end as promised."""
    outcome = forks.call(function, *args, stdin=stdin)
    assert outcome.wrong is None, f"{outcome.wrong}\n{outcome}"
    return outcome


def serve() -> None:
    """Answer requests, one a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("tests.fuzz.doors").warm()
    for line in sys.stdin:
        function, args, stdin = json.loads(line)
        print(json.dumps(_run(function, args, stdin)), file=answers, flush=True)


def _run(function: str, args: list[Any], stdin: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(stdin.encode())
        given.seek(0)
        before, started = _own_mb(), time.monotonic()
        child = os.fork()
        if child == 0:
            _child(function, args, [given.fileno(), out.fileno(), err.fileno()])
        status, usage = _wait(child)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "wall_s": time.monotonic() - started,
            "mb": max(0, usage.ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20) - before),
            "out": _text(out),
            "err": _text(err),
        }


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """Wait for the child, but not longer than the promise and its processes' own deaths take."""
    timer = threading.Timer(WALL_S + 1, _kill_group, [child])
    timer.start()
    try:
        _, status, usage = os.wait4(child, 0)
    finally:
        timer.cancel()
        timer.join()
    _kill_group(child)
    return status, usage


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _child(function: str, args: list[Any], files: list[int]) -> None:
    code = UNFORESEEN
    try:
        os.setpgid(0, 0)
        for target, file in enumerate(files):
            os.dup2(file, target)
        sys.stdin = os.fdopen(0, "r")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (KILLED_BY_CPU, KILLED_BY_CPU))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_own_bytes() + MOST_BYTES,) * 2)
        code = _called(function, args)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 the parent must see it
        traceback.print_exc()
    finally:
        os._exit(code)


def _called(function: str, args: list[Any]) -> int:
    from ring_mlx.cli.exit_codes import BAD_INPUT
    from ring_mlx.errors import RingError

    module, _, name = function.partition(":")
    try:
        code = getattr(importlib.import_module(module), name)(*args)
    except SystemExit as e:
        code = e.code
    except RingError as e:
        print(f"ring-mlx: {e}", file=sys.stderr)
        return BAD_INPUT
    return code if isinstance(code, int) else 0


def _own_mb() -> int:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20


def _own_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read(OUTPUT_BYTES).decode(errors="replace"))


if __name__ == "__main__":
    from tests.fuzz.server import serve as serve_as_imported

    serve_as_imported()
