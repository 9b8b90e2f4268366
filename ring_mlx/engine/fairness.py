"""Clients take turns, however many requests each has."""

from __future__ import annotations

from collections.abc import Iterable


class ClientTurns:
    """Remembers in which order the clients that wait had their last turns; one that did not wait comes first."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def last(self, client: str) -> int:
        """The number of a client's last turn; the least is next."""
        return self._last.get(client, 0)

    def take(self, client: str, waiting: Iterable[str]) -> None:
        """Give a client its turn, while these go on waiting."""
        self._last = {other: self.last(other) for other in waiting}
        self._last[client] = max(self._last.values(), default=0) + 1
