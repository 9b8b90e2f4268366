"""A progress bar for long prompts; knows counts, not models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from tqdm import tqdm


class PrefillBar(AbstractContextManager["PrefillBar"]):
    """A bar on standard error with rate and time left, for prompts of more than one step; silent without a terminal.

    Call it with (tokens done, all); use it as a context manager, which removes the bar at the end.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` tokens have been read."""
        if self._bar is None and total > self._step_tokens:
            self._bar = tqdm(total=total, desc="prompt", unit="tok", leave=False, disable=None)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
