"""Progress of a command on standard error: a bar at a terminal, else a line now and then."""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Self

from tqdm import tqdm

from ring_mlx.system.progress import duration
from ring_mlx.system.terminal_text import harmless, shown_bars

BAR_AFTER_S, TICK_S = 0.5, 0.2
# The least time before the first line and between two; later ones come after a tenth of the time gone.
LINE_AFTER_S, OF_THE_TIME = 5.0, 0.1


class _Bar(tqdm):
    """tqdm's, with a lock of this process alone: tqdm's own starts another process on a Mac."""


_Bar.set_lock(threading.RLock())


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Shows how far long work is until it ends; nothing if it ends at once.

    It is called as a `ring_mlx.system.progress.Progress`, and may begin again from 0 once all is done. A thread shows it, so
    that a long step is not silent. Of several, the one that was entered last is shown.

    Args:
        what: What is done, in a word or two.
        unit: Of the counts, such as "tok"; B is shown as MB and GB. Without a unit no counts are shown.
        quiet: Show nothing, as with RING_MLX_PROGRESS=0.
        lines: Show lines where there is no terminal.
    """

    def __init__(self, what: str, unit: str = "", *, quiet: bool = False, lines: bool = True) -> None:
        self._what, self._unit = what, unit
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        is_off = os.environ.get("RING_MLX_PROGRESS") == "0"
        self._is_quiet = quiet or is_off or not (self._is_terminal or lines)
        self._lock, self._over = threading.RLock(), threading.Event()
        self._bar: _Bar | None = None
        self._begin()

    def _begin(self) -> None:
        self._started = self._told = time.monotonic()
        self._done, self._total, self._said = 0.0, 0.0, ""
        self._ends: float | None = None

    def __enter__(self) -> Self:
        self._begin()
        if not self._is_quiet:
            shown_bars.append(self)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_quiet:
            return
        self._over.set()
        self._thread.join()
        shown_bars.remove(self)
        self._close()

    def __call__(self, done: float, total: float, said: str = "", left_s: float | None = None, /) -> None:
        """Take what is done of all, a few words more, and the seconds left if the counts do not tell them."""
        with self._lock:
            now = time.monotonic()
            if done < self._done:
                self._begin()
            if left_s is None and 0 < done <= total:
                left_s = (now - self._started) * (total - done) / done
            self._done, self._total, self._said = done, total, said
            self._ends = None if left_s is None or math.isinf(left_s) else now + left_s
            if total and done >= total:
                self._close()

    def hide(self) -> None:
        """Make room for other text, until `show`."""
        self._lock.acquire()
        if self._bar is not None:
            self._bar.clear()

    def show(self) -> None:
        """Come back after `hide`."""
        if self._bar is not None:
            self._bar.refresh()
        self._lock.release()

    def _watch(self) -> None:
        # Where standard error is closed, nothing is shown and the work goes on.
        with suppress(OSError, ValueError):
            self._show_until_over()

    def _show_until_over(self) -> None:
        while not self._over.wait(TICK_S):
            with self._lock:
                is_over = self._total and self._done >= self._total
                if shown_bars[-1] is self and not is_over:
                    self._tick(time.monotonic())
                else:
                    self._close()

    def _tick(self, now: float) -> None:
        gone = now - self._started
        if self._is_terminal:
            if gone >= BAR_AFTER_S:
                self._draw(now)
        elif now - self._told >= max(LINE_AFTER_S, OF_THE_TIME * gone):
            self._told = now
            print(f"ring-mlx: {self.text(now)}", file=sys.stderr, flush=True)

    def _draw(self, now: float) -> None:
        if self._bar is None:
            # A delay, so that nothing is drawn before the format is chosen.
            self._bar = _Bar(total=1.0, leave=False, file=sys.stderr, dynamic_ncols=True, delay=1e-9)
        self._bar.bar_format = "{desc}" if self._ends is None else "{percentage:3.0f}%|{bar:20}| {desc}"
        self._bar.n = self._part(now)
        self._bar.set_description_str(self.text(now))

    def _part(self, now: float) -> float:
        """How much of the time is gone, as far as is known; less than all of it."""
        gone, left = now - self._started, max(0.0, (self._ends or now) - now)
        return min(0.99, gone / (gone + left or 1.0))

    def text(self, now: float) -> str:
        """Counts, words and times in one line."""
        counts = _counts(self._done, self._total, self._unit) if self._total else ""
        told = ", ".join(part for part in (counts, self._said) if part)
        times = f"{duration(now - self._started)} so far"
        if self._ends is not None and now < self._ends:
            times += f", about {duration(self._ends - now)} left"
        return harmless(f"{self._what}: {told}; {times}" if told else f"{self._what}: {times}", is_name=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def bar_of(args: argparse.Namespace, what: str, unit: str = "", is_heard: bool = True) -> ProgressBar:
    """A bar for a command's options: none with --quiet or where another rank speaks, and no lines with --json."""
    is_json = getattr(args, "json", None) is True  # where it names a file, text is printed as well
    return ProgressBar(what, unit, quiet=args.quiet or not is_heard, lines=not is_json)


def _counts(done: float, total: float, unit: str) -> str:
    if unit != "B":
        return f"{done:,.0f} of {total:,.0f} {unit}" if unit else ""
    scale, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / scale:.1f} of {total / scale:.1f} {name}"
