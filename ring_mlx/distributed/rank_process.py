"""One rank as its launcher sees it: a process here, or an ssh that holds one elsewhere."""

from __future__ import annotations

import codecs
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ring_mlx.distributed.failure import LOST, DistributedError
from ring_mlx.distributed.heartbeat import ALIVE, JOINED, VARIABLE
from ring_mlx.distributed.hosts import SSH, Host
from ring_mlx.system.terminal_text import harmless

CHUNK, LONGEST_LINE, NOISE_LINES = 1 << 16, 1 << 20, 20
SSH_FAILED, BAD_INPUT = 255, 2
_MEANING: dict[int, str] = {
    signal.SIGKILL: ", as the system does where memory is short",
    signal.SIGALRM: ", since the others did not come",
}

Say = Callable[[int, str], None]


@dataclass(frozen=True)
class Job:
    """What a rank runs.

    Attributes:
        python, command: The interpreter there, and what comes after ``-P -m ring_mlx``: no code of the folder is run.
        env: Variables.
        files: Contents of files that variables name.
    """

    python: str
    command: list[str]
    env: Mapping[str, str]
    files: Mapping[str, str]


class RankProcess:
    """Starts a rank and passes on what it says; standard output is that of rank 0 alone, byte for byte.

    Args:
        rank: Which.
        host: Where.
        job: What it runs.
        scratch: A folder for temporary files here.
        say: Takes lines of its standard error.
    """

    def __init__(self, rank: int, host: Host, job: Job, scratch: Path, say: Say) -> None:
        self.rank, self.host, self._say = rank, host, say
        self.heard_at: float | None = None
        self.joined = False
        self._answers = rank == 0 and sys.stdout is not None  # a shell may close it
        self._mark = secrets.token_hex(16)
        self._before: deque[str] = deque(maxlen=NOISE_LINES)
        self._log = scratch / f"ssh{rank}.log"
        self._busy: set[str] = set()
        self._process = self._start_here(job, scratch) if host.is_local else self._start_there(job)
        readers = ((self._read_errors, self._process.stderr), (self._read_answers, self._process.stdout))
        self._threads = [threading.Thread(target=f, args=(out,), daemon=True) for f, out in readers if out is not None]
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int | None:
        """The exit code once it has ended; `LOST` where a signal or a broken connection ended it, 2 where none came."""
        code = self._process.poll()
        if code == SSH_FAILED and not self.host.is_local:
            return BAD_INPUT if self.heard_at is None else LOST
        return LOST if code is not None and code < 0 else code

    @property
    def was_killed(self) -> bool:
        """Whether a signal has ended the process here."""
        return self.host.is_local and (self._process.poll() or 0) < 0

    def silent_s(self) -> float:
        """How long it has not been heard, as far as somebody listened; 0 before the first time."""
        return 0.0 if self.heard_at is None or self._busy else time.monotonic() - self.heard_at

    def tell(self, word: bytes) -> None:
        """Send a byte, where it is still there and reads."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            self._process.stdin.write(word)

    def cut(self) -> None:
        """Cut the lifeline: the rank ends itself."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process here at once."""
        self._process.kill()

    def finish(self, timeout_s: float) -> None:
        """Wait until what it has said is passed on."""
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout_s)

    def why(self) -> str:
        """Why it has ended without a word of its own."""
        code = self._process.poll() or 0
        name = f"rank {self.rank} ({self.host.name})"
        if code < 0:
            return f"{name} was killed by signal {-code}{_MEANING.get(-code, '')}; look there and start all again."
        ssh = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        said = (ssh or [*self._before] or ["nothing said"])[-1]
        if self.host.is_local or code != SSH_FAILED:
            return f"{name} ended with exit code {code} ({said}); look there and start all again."
        if self.heard_at is None:
            return f"{name} could not be reached ({said}); see that `ssh {self.host.name}` works without a password."
        return f"{name} was killed or its connection lost ({said}); look there and start all again."

    def _start_here(self, job: Job, scratch: Path) -> subprocess.Popen[bytes]:
        files = {}
        for name, text in job.files.items():
            file = scratch / f"{name}{self.rank}"
            file.write_text(text, encoding="utf-8")
            files[name] = str(file)
        env = os.environ | job.env | files | {VARIABLE: ""}
        out = None if self._answers else subprocess.DEVNULL
        return _popen([job.python, "-P", "-m", "ring_mlx", *job.command], out, env)

    def _start_there(self, job: Job) -> subprocess.Popen[bytes]:
        boot = f"exec {shlex.quote(job.python)} -P -m ring_mlx.distributed.boot"
        out = subprocess.PIPE if self._answers else subprocess.DEVNULL
        process = _popen([*SSH, "-E", str(self._log), "--", self.host.name, boot], out, None)
        told = {"mark": self._mark, "cwd": os.getcwd(), **vars(job)}
        # On a thread: ssh reads nothing before it has a connection.
        threading.Thread(target=self._introduce, args=(process, told), daemon=True).start()
        return process

    def _introduce(self, process: subprocess.Popen[bytes], told: dict[str, object]) -> None:
        assert process.stdin is not None
        with suppress(OSError, ValueError):
            _write_all(process.stdin.fileno(), json.dumps(told).encode() + b"\n")

    def _read_errors(self, errors: IO[bytes]) -> None:
        """Lines of standard error, without the bytes that are for the launcher."""
        rest, started = b"", self.host.is_local
        with errors:
            while data := os.read(errors.fileno(), CHUNK):
                if ALIVE in data or JOINED in data:
                    self.heard_at, self.joined = time.monotonic(), self.joined or JOINED in data
                *lines, rest = (rest + data.replace(ALIVE, b"").replace(JOINED, b"")).split(b"\n")
                for line in lines:
                    if started:
                        self._pass_on(line)
                    elif line.endswith(self._mark.encode()):
                        started = True
                    else:
                        self._before.append(harmless(line.decode(errors="replace").strip()))
                if len(rest) > LONGEST_LINE:
                    self._pass_on(rest)
                    rest = b""
        if rest:
            self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        with self._passing_on("errors"):
            self._say(self.rank, harmless(line.decode(errors="replace").rpartition("\r")[2]))

    def _read_answers(self, out: IO[bytes]) -> None:
        """Standard output from the mark on; what a shell says before it is an error, if anything."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode if sys.stdout.isatty() else None
        before, started = b"", False
        with out:
            while data := os.read(out.fileno(), CHUNK):
                if not started:
                    greeting, found, data = (before + data).partition(self._mark.encode() + b"\n")
                    started, before = bool(found), greeting[-CHUNK:]
                    if started and before:
                        self._pass_on(before.rstrip(b"\n"))
                with self._passing_on("answers"):
                    try:
                        _write_all(1, data if decode is None else harmless(decode(data)).encode())
                    except OSError:
                        return  # nobody reads: closing the pipe tells the rank

    @contextmanager
    def _passing_on(self, what: str) -> Iterator[None]:
        """Who reads what a rank says may be slow; meanwhile the rank is not heard, and not silent."""
        self._busy.add(what)
        try:
            yield
        finally:
            self.heard_at = self.heard_at and time.monotonic()
            self._busy.discard(what)


def _popen(command: list[str], out: int | None, env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """A process that no signal of the terminal reaches."""
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command, bufsize=0, stdin=pipe, stdout=out, stderr=pipe, env=env, start_new_session=True
        )
    except (OSError, ValueError) as e:
        raise DistributedError(f"{command[0]} could not be run ({e}); correct --python or install it.") from None


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
