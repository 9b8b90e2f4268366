"""One rank as its launcher sees it: a process here, or an ssh to one elsewhere."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ring_mlx.distributed.failure import LOST, DistributedError
from ring_mlx.distributed.heartbeat import ALIVE, JOINED
from ring_mlx.distributed.hosts import SSH, Host
from ring_mlx.system.terminal_text import harmless

CHUNK, LONGEST_LINE = 1 << 16, 1 << 20
SSH_FAILED, BAD_INPUT = 255, 2
_MEANING: dict[int, str] = {
    signal.SIGKILL: ", as the system does where memory is short",
    signal.SIGALRM: ", since the others did not come",
}


@dataclass(frozen=True)
class Job:
    """What a rank runs."""

    python: str
    command: list[str]  # after ``-P -m ring_mlx``: no code of the folder is run
    env: Mapping[str, str]
    files: Mapping[str, str]  # contents of files that variables name


class RankProcess:
    """Starts a rank and passes on what it prints; standard output is that of rank 0 alone, byte for byte.

    ``scratch`` is a folder for temporary files here; ``say`` takes lines of its standard error.
    """

    def __init__(self, rank: int, host: Host, job: Job, scratch: Path, say: Callable[[int, str], None]) -> None:
        self.rank, self.host, self.name, self._say = rank, host, f"rank {rank} ({host.name})", say
        self.heard_at: float | None = None
        self.joined = False
        # Where a shell may print before the rank does, a mark says where the rank begins.
        self._mark = "" if host.is_local else secrets.token_hex(16) + "\n"
        self._shell_errors = b""
        self._log = scratch / f"ssh{rank}.log"
        self._busy: set[str] = set()
        self._process = self._start(job, scratch)
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
        return self.host.is_local and (self._process.poll() or 0) < 0

    def silent_s(self) -> float:
        """How long nothing was received while the launcher listened; 0 before the first time."""
        return 0.0 if self.heard_at is None or self._busy else time.monotonic() - self.heard_at

    def tell(self, word: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            self._process.stdin.write(word)

    def cut(self) -> None:
        """Close its standard input: the rank ends itself."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def finish(self, timeout_s: float) -> None:
        """Wait until its output is passed on."""
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout_s)

    def why(self) -> str:
        """Why it ended, if it printed no reason."""
        code = self._process.poll() or 0
        again = "look there and start all again."
        if code < 0:
            return f"{self.name} was killed by signal {-code}{_MEANING.get(-code, '')}; {again}"
        ssh = self._log.read_text(errors="replace") if self._log.exists() else ""
        shell = harmless(self._shell_errors.decode(errors="replace"))
        said = ((ssh or shell).strip().splitlines() or ["nothing said"])[-1].strip()
        if self.host.is_local or code != SSH_FAILED:
            return f"{self.name} ended with exit code {code} ({said}); {again}"
        if self.heard_at is None:
            again = f"see that `ssh {self.host.name}` works without a password."
            return f"{self.name} could not be reached ({said}); {again}"
        return f"{self.name} was killed or its connection lost ({said}); {again}"

    def _start(self, job: Job, scratch: Path) -> subprocess.Popen[bytes]:
        """`ring_mlx.distributed.boot`, in a session of its own: no signal of the terminal reaches it."""
        is_local, pipe, out = self.host.is_local, subprocess.PIPE, subprocess.DEVNULL
        command = [job.python, "-P", "-m", "ring_mlx.distributed.boot"]
        if not is_local:
            command = [*SSH, "-E", str(self._log), "--", self.host.name, f"exec {shlex.join(command)}"]
        answers = (None if is_local else pipe) if self.rank == 0 and sys.stdout is not None else out
        try:
            process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=answers, stderr=pipe, start_new_session=True
            )
        except (OSError, ValueError) as e:
            raise DistributedError(f"{command[0]} could not be run ({e}); correct --python or install it.") from None
        folder = str(scratch) if is_local else None
        told = json.dumps({"mark": self._mark, "scratch": folder, "cwd": os.getcwd(), **vars(job)}).encode() + b"\n"
        # On a thread: ssh reads nothing before it has a connection.
        threading.Thread(target=_introduce, args=(process, told), daemon=True).start()
        return process

    def _printed(self, stream: IO[bytes]) -> Iterator[bytes]:
        """The output from the mark on; text of a shell before it goes to standard error."""
        shell, mark = b"", self._mark.encode()
        with stream:
            while data := os.read(stream.fileno(), CHUNK):
                if mark:
                    shell, found, data = (shell + data).partition(mark)
                    shell, mark = shell[-CHUNK:], b"" if found else mark
                    if stream is self._process.stderr:
                        self._shell_errors = shell
                    elif found and shell:
                        self._pass_on(shell.rstrip(b"\n"))
                yield data

    def _read_errors(self, errors: IO[bytes]) -> None:
        """Lines of standard error, without the bytes that are for the launcher."""
        rest = b""
        for data in self._printed(errors):
            if ALIVE in data or JOINED in data:
                self.heard_at, self.joined = time.monotonic(), self.joined or JOINED in data
            *lines, rest = (rest + data.replace(ALIVE, b"").replace(JOINED, b"")).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._pass_on(line)
        if rest:
            self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        with self._passing_on("errors"):
            self._say(self.rank, harmless(line.decode(errors="replace").rpartition("\r")[2]))

    def _read_answers(self, out: IO[bytes]) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode if sys.stdout.isatty() else None
        for data in self._printed(out):
            with self._passing_on("answers"):
                try:
                    _write_all(1, data if decode is None else harmless(decode(data)).encode())
                except OSError:  # nobody reads: closing the pipe tells the rank
                    out.close()
                    return

    @contextmanager
    def _passing_on(self, what: str) -> Iterator[None]:
        """A slow reader of output delays listening; that does not count as silence of the rank."""
        self._busy.add(what)
        try:
            yield
        finally:
            self.heard_at = self.heard_at and time.monotonic()
            self._busy.discard(what)


def _introduce(process: subprocess.Popen[bytes], told: bytes) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        _write_all(process.stdin.fileno(), told)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
