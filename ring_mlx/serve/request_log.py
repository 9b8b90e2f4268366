"""One line of JSON for each request: what it cost and how it ended, never its text or a key."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING

from ring_mlx.errors import OptionError
from ring_mlx.system.terminal_text import note

if TYPE_CHECKING:
    from ring_mlx.serve.answer import Answer
    from ring_mlx.serve.protocol import ApiRequest


@dataclass
class Cost:
    """What is known of a request while it is answered, for the log.

    Attributes:
        began, read: When its head and its body had been read (``time.perf_counter``).
        finish: How its answer ended, in the words of its route.
    """

    began: float = field(default_factory=time.perf_counter)
    read: float = 0.0
    model: str | None = None
    request: ApiRequest | None = None
    answer: Answer | None = None
    finish: str | None = None

    def line(self, client: str, method: str, route: str, status: str) -> dict[str, object]:
        """What the log says; seconds but for the duration count from the body's end."""
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": client,
            "method": method,
            "route": route,
            "status": int(status) if status.isdecimal() else status,
            "model": self.model,
            "duration_s": round(time.perf_counter() - self.began, 4),
        }
        request, answer = self.request, self.answer
        if request is None or request.prepared is None or answer is None:
            return line
        return line | {
            "stream": request.stream,
            "prompt_tokens": len(request.prepared.prompt.ids),
            "cached_tokens": answer.statistics.reused_tokens,
            "completion_tokens": answer.statistics.generated_tokens if self.finish else None,
            "queue_s": self._after(request.admitted),
            "first_token_s": self._after(request.first_token),
            "finish": self.finish,
        }

    def _after(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self.read, 4)


class RequestLog:
    """Appends lines to a file, or to standard output.

    A file that was moved or removed is created again, as programs that rotate logs expect. A line that cannot be written is
    lost, and told once: requests go on.

    Args:
        path: The file, readable by its owner only where it is made here; ``-`` is standard output.

    Raises:
        OptionError: If the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock, self._is_told = path, threading.Lock(), False
        self._file: IO[str] | None = None
        if path != "-":
            try:
                self._open()
            except OSError as e:
                raise OptionError(
                    f"--log {path!r} cannot be written ({e.strerror}); give another file, or -."
                ) from None

    def write(self, fields: Mapping[str, object]) -> None:
        """Write a line; from any thread."""
        line = json.dumps(fields) + "\n"
        with self._lock:
            try:
                if self._path == "-":
                    sys.stdout.write(line)
                    sys.stdout.flush()
                else:
                    self._write(line)
                self._is_told = False
            except (OSError, ValueError) as e:
                if not self._is_told:
                    note(f"[serve] lines of --log are lost ({e}); make room for {self._path}.")
                self._is_told = True

    def close(self) -> None:
        with self._lock:
            self._close()

    def _write(self, line: str) -> None:
        if self._file is None or self._is_moved():
            self._close()
            self._open()
        assert self._file is not None
        try:
            self._file.write(line)
            self._file.flush()
        except OSError:
            self._close()  # what is left in its buffer would come again, and the next line may be whole
            raise

    def _is_moved(self) -> bool:
        assert self._file is not None
        try:
            there, ours = os.stat(self._path), os.fstat(self._file.fileno())
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _open(self) -> None:
        number = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(number, "a", encoding="utf-8")

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
