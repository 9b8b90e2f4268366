"""Responses that clients may ask for again or go on from, bounded by their number and bytes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.turns import Message

MOST_RESPONSES, MOST_RESPONSES_BYTES = 1_000, 64 << 20


@dataclass(frozen=True)
class Kept:
    """A response, its items by their ids, and the conversation up to its end without instructions, all as JSON."""

    response: bytes
    items: dict[str, bytes]
    messages: bytes

    @property
    def nbytes(self) -> int:
        return len(self.response) + sum(map(len, self.items.values())) + len(self.messages)


class Stored:
    """The latest responses in memory, each of at most ``longest`` bytes; those used longest ago go first."""

    def __init__(self, longest: int, most: int = MOST_RESPONSES, most_bytes: int = MOST_RESPONSES_BYTES) -> None:
        self._longest, self._most, self._most_bytes, self._lock = longest, most, most_bytes, threading.Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._items: dict[str, bytes] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response: dict[str, Any], messages: list[Message]) -> None:
        """Keep a response, unless it is too long."""
        items = {item["id"]: json.dumps(item).encode() for item in response["output"]}
        kept = Kept(json.dumps(response).encode(), items, json.dumps(messages).encode())
        if kept.nbytes > min(self._longest, self._most_bytes):
            return
        with self._lock:
            self._kept[response["id"]] = kept
            self._items |= items
            self.nbytes += kept.nbytes
            while len(self._kept) > self._most or self.nbytes > self._most_bytes:
                self._forget(next(iter(self._kept)))

    def _forget(self, name: str) -> None:
        kept = self._kept.pop(name)
        self.nbytes -= kept.nbytes
        for item in kept.items:
            del self._items[item]

    def get(self, name: str, param: str | None = None) -> Kept:
        """A response by its id.

        Raises ApiError if it is not there (any more): 404, or 400 if it is the ``param`` of another request, as OpenAI does.
        """
        with self._lock:
            if name not in self._kept:
                status, code = (400, "previous_response_not_found") if param else (404, "response_not_found")
                text = f"no response {name[:100]!r} here (any more); send the whole conversation as input."
                raise ApiError(status, text, param, code)
            self._kept.move_to_end(name)
            return self._kept[name]

    def size_of(self, body: Mapping[str, Any]) -> int:
        """The bytes that a request reads here."""
        name = body.get("previous_response_id")
        with self._lock:
            return len(self._kept[name].messages) if isinstance(name, str) and name in self._kept else 0

    def drop(self, name: str) -> None:
        """Forget a response. Raises ApiError 404 if it is not there."""
        self.get(name)
        with self._lock:
            if name in self._kept:
                self._forget(name)

    def item(self, name: str, param: str) -> dict[str, Any]:
        """An item of a response by its id. Raises ApiError 404 if it is not there."""
        with self._lock:
            found = self._items.get(name)
        if found is None:
            raise ApiError(
                404, f"no item {name[:100]!r} here (any more); send the item itself.", param, "item_not_found"
            )
        return dict(json.loads(found))
