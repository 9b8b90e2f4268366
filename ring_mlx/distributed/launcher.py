"""Runs a command on all ranks: starts them together, watches them, and ends all when one is missing."""

from __future__ import annotations

import math
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ring_mlx.distributed.failure import LOST
from ring_mlx.distributed.heartbeat import BEAT, BEAT_S, INTERRUPT, SILENT_S, START
from ring_mlx.distributed.hosts import Host
from ring_mlx.distributed.rank_process import Job, RankProcess

BROKEN_PIPE, INTERRUPTED = 141, 130
CUT_OFF = 4  # an answer that was cut off: the rank has not failed
TURN_S = 0.05
# How long ranks may take to start, to find each other, to do as they are told, and to end of themselves when one has
# failed or is lost.
START_S, JOIN_S, OBEY_S, FAILED_S, LOST_S = 300.0, 15.0, 10.0, 3.0, 0.5
# How long a line that tells a failure is held until it is clear that nothing ends, and how many lines are compared.
HELD_S, REMEMBERED = 6.0, 200
# What MLX writes of its sockets. It comes in pieces, so that any line may begin in the middle of it.
_BACKEND = re.compile(r"\[(?:ring|jaccl)\]")
_SOCKETS = re.compile(
    rf"(?:{_BACKEND.pattern}|(?:Receiving from |Sending to )?[Ss]ocket|was closed by the peer|failed with errno"
    r"|made no progress|Too many send/recv errors\. Failing pending tasks\.\.\.|-?\d+|\s)+"
)
_FAILURE = re.compile(r"ring-mlx[\w -]*: \[")


class Launcher:
    """The ranks of one run; of the signals in ``told`` the first ends them as Ctrl-C does, the second at once."""

    def __init__(self, told: list[int]) -> None:
        self._told = told
        self._ranks: list[RankProcess] = []
        self._ended: list[RankProcess] = []
        self._failed: list[RankProcess] = []
        self._messages = Messages()
        self._started_at = self._beat_at = time.monotonic()
        self._all_started_at: float | None = None
        self._deadline = math.inf
        self._is_interrupted = self._is_closing = False
        self._missed: str | None = None

    def run(self, hosts: Sequence[Host], job: Job) -> int:
        """Run a job on every host, one a rank; DistributedError says that a process cannot be started.

        Returns the exit code: 130 where it was told to end, else that of the first rank that failed.
        """
        with tempfile.TemporaryDirectory(prefix="ring-mlx-") as scratch:
            try:
                for rank, host in enumerate(hosts):
                    own = replace(job, env={**job.env, "MLX_RANK": str(rank)})
                    self._ranks.append(RankProcess(rank, host, own, Path(scratch), self._messages.say))
                while len(self._ended) < len(self._ranks):
                    self._turn(time.monotonic())
                    time.sleep(TURN_S)
            finally:
                self._end_all()
                for started in self._ranks:
                    started.finish(FAILED_S)
                self._messages.is_closed = True
            return self._conclude()

    def _turn(self, now: float) -> None:
        for rank in self._ranks:
            if rank not in self._ended and rank.code is not None:
                self._ended.append(rank)
                if rank.code not in (0, CUT_OFF) and not self._is_closing:
                    self._failed.append(rank)
                if rank.code or self._is_interrupted:
                    self._end_within(LOST_S if rank.code == LOST else FAILED_S)
        if self._told and not self._is_interrupted:
            self._interrupt()
        if self._missed is None and (missing := self._find_missing(now)):
            self._missed = f"{missing}; look there and start all again."
            self._end_within(LOST_S)
        if now >= self._beat_at:
            self._tell(BEAT)
            self._beat_at = now + BEAT_S
        if len(self._told) > 1 or now > self._deadline:
            self._end_all()

    def _find_missing(self, now: float) -> str | None:
        """A line about a rank that does not start, does not connect, or is silent."""
        living = [r for r in self._ranks if r not in self._ended]
        if self._all_started_at is None:
            late = [r for r in living if r.heard_at is None]
            if not late and not self._ended:
                self._all_started_at = now
                self._tell(START)
            elif late and now > self._started_at + START_S:
                return f"{late[0].name} has not started within {START_S:.0f} s"
            return None
        alone = [r for r in living if not r.joined]
        if alone and now < self._all_started_at + JOIN_S:
            return None  # MLX lets no other thread run while it looks for the others
        if alone:
            return f"{alone[0].name} has not reached the others within {JOIN_S:.0f} s (a firewall?)"
        silent = [r for r in living if r.silent_s() > SILENT_S]
        return f"{silent[0].name} is silent for {SILENT_S:.0f} s" if silent else None

    def _interrupt(self) -> None:
        self._is_interrupted = self._messages.is_interrupted = True
        self._end_within(OBEY_S)
        for rank in self._ranks:
            if rank.heard_at is None:
                rank.kill()  # it does not listen yet
        self._tell(INTERRUPT)

    def _tell(self, word: bytes) -> None:
        for rank in self._ranks:
            if rank.heard_at is not None:  # what is sent before is no message to a rank
                rank.tell(word)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _end_all(self) -> None:
        """Tell all ranks to end, and kill those that still run a moment later."""
        self._is_closing = True
        for rank in self._ranks:
            rank.cut()
        end = time.monotonic() + LOST_S
        while time.monotonic() < end and any(r.code is None for r in self._ranks):
            time.sleep(TURN_S)
        for rank in self._ranks:
            if rank.code is None:
                rank.kill()

    def _conclude(self) -> int:
        """Say in one line why all end, unless a rank has said it; returns the exit code."""
        failed = [r for r in self._failed if r.code != LOST] or self._failed
        ended = self._ranks[0].code or 0
        code = (failed[0].code or LOST) if failed else ended if self._missed is None else LOST
        if self._is_interrupted or code in (0, CUT_OFF, BROKEN_PIPE):
            self._messages.conclude(None)
            return INTERRUPTED if self._is_interrupted else code
        # What a refusing rank says comes before what the others make of its end.
        known = self._messages.failure_of([r.rank for r in failed if r.code != LOST])
        killed = next((r.why() for r in self._failed if r.was_killed), None)
        any_rank = killed or self._messages.failure_of(range(len(self._ranks)))
        self._messages.conclude(known or any_rank or self._missed or failed[0].why())
        return code


class Messages:
    """Lines of standard error: equal lines of several ranks are shown once, and one line at the end says why all end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[tuple[int, str]] = deque(maxlen=REMEMBERED)
        self._held: list[tuple[float, int, str]] = []
        self._explained_at = -HELD_S
        self.is_interrupted = self.is_closed = False
        # Apart from the thread that beats, since writing may wait for a reader; what is held when all ends stays held.
        threading.Thread(target=self._release, daemon=True).start()

    def say(self, rank: int, line: str) -> None:
        with self._lock:
            if line and "MLX_RING_VERBOSE" not in os.environ and not (line := _without_sockets(line)):
                return  # the reason follows
            if self.is_interrupted and not line.startswith("ring-mlx: "):
                return  # how the interpreter takes it
            if any(line == said and rank != other for other, said in self._recent):
                return
            self._recent.append((rank, line))
            if _FAILURE.match(line):
                self._held.append((time.monotonic(), rank, line))
            else:
                _write(line)

    def _release(self) -> None:
        """Print held lines, if the ranks go on."""
        while not self.is_closed:
            time.sleep(1)
            with self._lock:
                while self._held and time.monotonic() > self._held[0][0] + HELD_S and not self.is_closed:
                    _write(self._held.pop(0)[2])
                    self._explained_at = time.monotonic()

    def failure_of(self, ranks: Sequence[int]) -> str | None:
        """The first held failure of one of these ranks."""
        return next((line for _, rank, line in self._held if rank in ranks), None)

    def conclude(self, why: str | None) -> None:
        """Say why all end, or else print the ranks' other failures."""
        if why is None:
            for _, _, line in self._held:
                if not line.startswith("ring-mlx: [distributed]"):
                    _write(line)
        elif time.monotonic() > self._explained_at + 2 * HELD_S:
            _write(why if why.startswith("ring-mlx") else f"ring-mlx: [distributed] {why}")


def _without_sockets(line: str) -> str:
    """The line without MLX's text about sockets before it; a line of ours may begin with a number."""
    sockets = _SOCKETS.match(line)
    if sockets is None or not (sockets.end() == len(line) or re.search("[a-z]", sockets[0])):
        return line
    rest = line[sockets.end() :]
    return "" if _BACKEND.match(line) and not rest.startswith("ring-mlx") else rest


def _write(line: str) -> None:
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace") + b"\n")
