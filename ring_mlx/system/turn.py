"""A lock that is given to its waiters in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """As ``threading.Lock`` within ``with``, but a thread that takes it again at once does not come before those that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self.is_held = False

    def __enter__(self) -> None:
        with self._lock:
            if not self.is_held:
                self.is_held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()  # it stays held, now by that thread
            else:
                self.is_held = False


# Models of one process compute in turns, a step each: side by side their times would mean nothing, and each would be slower.
DEVICE = FairLock()
