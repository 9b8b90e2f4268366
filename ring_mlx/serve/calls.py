"""The calls of tools that were answered, as the model wrote them.

Clients send calls back with defaults filled in or in another order (Claude Code does). The prompt would differ from what
the model wrote, and all that follows would be read again.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from ring_mlx.serve.answer import Call
from ring_mlx.serve.turns import Message

MOST_CALLS, MOST_BYTES = 4_096, 16 << 20


class Calls:
    """Names and arguments by the ids of the latest calls."""

    def __init__(self, most: int = MOST_CALLS, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes, self._lock = most, most_bytes, threading.Lock()
        self._kept: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._nbytes = 0

    def keep(self, calls: Iterable[Call]) -> None:
        """Keep the calls of an answer."""
        with self._lock:
            for call in calls:
                self._kept[call.id] = call.name, call.text
                self._nbytes += len(call.text.encode())
            while len(self._kept) > self._most or self._nbytes > self._most_bytes:
                self._nbytes -= len(self._kept.popitem(last=False)[1][1].encode())

    def restore(self, messages: Iterable[Message]) -> None:
        """Give calls the arguments that the model wrote, where the client has only added to them or moved them."""
        for message in messages:
            for call in message.get("tool_calls", ()):
                function = call["function"]
                with self._lock:
                    name, text = self._kept.get(call.get("id", ""), ("", "{}"))
                if name == function["name"] and isinstance(given := function["arguments"], Mapping):
                    wrote = json.loads(text)
                    if all(key in given and _same(value, given[key]) for key, value in wrote.items()):
                        function["arguments"] = wrote


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON; in Python 1 equals 1.0 and true."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
