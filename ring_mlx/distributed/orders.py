"""Messages from rank 0 to the others: one line of JSON each, over separate sockets.

MLX's backends poll while they wait, and a server may wait for hours: waiting here takes no processor.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from typing import Any


class Orders:
    """One end: rank 0's, which tells, or another's, which hears.

    Args:
        peers: Connected sockets; of another rank, the one to rank 0.
    """

    def __init__(self, peers: Iterable[socket.socket]) -> None:
        self._peers = list(peers)
        for peer in self._peers:
            peer.settimeout(None)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._peers[0].makefile("rb")

    def tell(self, value: Any) -> None:
        """Send to all.

        Raises:
            OSError: If one is gone.
        """
        line = json.dumps(value).encode() + b"\n"
        for peer in self._peers:
            peer.sendall(line)

    def hear(self) -> Any:
        """Wait for what comes next.

        Raises:
            OSError: If rank 0 is gone.
        """
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("rank 0 says no more")
        return json.loads(line)

    def close(self) -> None:
        """Say no more."""
        self._lines.close()
        for peer in self._peers:
            peer.close()
