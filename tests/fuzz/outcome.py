"""How one example ended, and what is wrong with that."""

from __future__ import annotations

from dataclasses import dataclass

# The wall's time ends what waits for ever. It is long, since on a busy machine 10 s of the processor's take minutes.
CPU_S, WALL_S, MEMORY_MB = 10, 240, 1024
CUT_OFF = 4  # an answer as long as was asked for
PREFIX, LINE = "ring-mlx: ", 4000


@dataclass(frozen=True)
class Outcome:
    """A forked call: exit code (negative: the signal), processor time, memory over the server's own, and output."""

    code: int
    cpu_s: float
    wall_s: float
    mb: int
    out: str
    err: str

    @property
    def wrong(self) -> str | None:
        """What the promise does not allow, or None."""
        found = [
            f"signal {-self.code}" if self.code < 0 else "",
            f"{self.cpu_s:.1f} s of processor time" if self.cpu_s > CPU_S else "",
            f"{self.wall_s:.1f} s" if self.wall_s > WALL_S else "",
            f"{self.mb} MB" if self.mb > MEMORY_MB else "",
            "traceback" if "Traceback (most recent call last)" in self.err else "",
            "panic" if "panicked" in self.err else "",
            f"exit code {self.code}" if self.code not in (0, 2, CUT_OFF) else "",
            self._not_one_line() if self.code == 2 else "",
        ]
        return ", ".join(f for f in found if f) or None

    def _not_one_line(self) -> str:
        lines = self.err.strip().splitlines()
        # The plain chat says its errors without the command's name.
        if not lines or not lines[-1].removeprefix(PREFIX).startswith("["):
            return "no line that names its origin"
        own = all(line.startswith((PREFIX, "[")) for line in lines)
        return "" if own and len(lines[-1]) <= LINE else "more than the command's own lines"

    def __str__(self) -> str:
        tail = self.err.strip()[-1500:]
        return f"exit code {self.code}, {self.cpu_s:.1f} s cpu, {self.wall_s:.1f} s, {self.mb} MB\n{tail}"
