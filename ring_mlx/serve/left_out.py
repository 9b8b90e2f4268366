"""What a client sent and the answer does not depend on, though it should: the client is told in a header."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from ring_mlx.system.terminal_text import note

HEADER = "X-Ring-Left-Out"
MOST_NAMES, MOST_CHARS, MOST_TOLD = 20, 60, 200
NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.\-\[\] ]")


class LeftOut:
    """Names in the order in which they were met, each once."""

    def __init__(self, given: Mapping[str, object] | None = None, known: Container[str] = ()) -> None:
        self._names: dict[str, None] = {}
        self.note(given or {}, known)

    def note(self, given: Mapping[str, object], known: Container[str], place: str = "") -> None:
        """Note what is given and not known."""
        for name, value in given.items():
            if value is not None and name not in known:
                self.add(place + name)

    def add(self, name: str) -> None:
        """Note a name, as a header can hold it."""
        if len(self._names) < MOST_NAMES:
            self._names[NOT_PLAIN.sub("?", name)[:MOST_CHARS].strip() or "?"] = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)


class Log:
    """Tells the server's log of each name once: agents send the same fields with every request."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self._told]
        if new and len(self._told) < MOST_TOLD:
            self._told.update(new)
            note(f"[serve] left out of requests: {', '.join(new)}.")
