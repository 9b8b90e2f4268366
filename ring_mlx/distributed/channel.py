"""Sockets between rank 0 and each other rank, and messages over them."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.group import exchange

CALL_S, WORD_S = 60.0, 6.0


class Channel:
    """Sends a line of JSON from rank 0 to all others.

    mlx-lm shares objects through the group, pickled. MLX's backends poll while they wait, and a server may wait for
    hours: waiting here takes no processor.

    Args:
        peers: Connected sockets; of another rank, the one to rank 0.
    """

    def __init__(self, peers: Iterable[socket.socket]) -> None:
        self._peers = list(peers)
        for peer in self._peers:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._peers[0].makefile("rb")

    def send(self, value: Any) -> None:
        """Send to all; raises OSError if one is gone."""
        line = json.dumps(value).encode() + b"\n"
        for peer in self._peers:
            peer.sendall(line)

    def receive(self) -> Any:
        """Wait for the next message; raises OSError if rank 0 is gone."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("rank 0 says no more")
        return json.loads(line)


def connect(group: mx.distributed.Group) -> tuple[dict[int, socket.socket], list[str]]:
    """Sockets between rank 0 and each other by rank, and the names of all hosts; every rank must call it.

    Raises:
        DistributedError: If one cannot be reached.
    """
    rank, address, secret, server = group.rank(), "", secrets.token_hex(8), None
    if rank == 0:
        address = _own_address()
        server = socket.create_server((address, 0), backlog=64)
    port = server.getsockname()[1] if server else 0
    records = exchange(group, {"host": socket.gethostname(), "address": address, "port": port, "secret": secret})
    first = records[0]
    try:
        if server is not None:
            peers = _accept(server, secret, group.size())
        else:
            peers = {0: socket.create_connection((first["address"], first["port"]), CALL_S)}
            peers[0].sendall(f"{first['secret']} {rank}\n".encode())
    except OSError as e:
        raise DistributedError(
            f"rank {rank} cannot reach rank 0 ({first['host']}, {first['address']}:{first['port']}: {e}); allow "
            "connections between them in the firewall."
        ) from None
    for peer in peers.values():
        peer.settimeout(None)
    return peers, [r["host"] for r in records]


def _accept(server: socket.socket, secret: str, size: int) -> dict[int, socket.socket]:
    server.settimeout(CALL_S)
    peers: dict[int, socket.socket] = {}
    with server:
        while len(peers) < size - 1:
            peer, _ = server.accept()
            rank = _rank_of(peer, secret)
            if rank is not None and 0 < rank < size:
                peers[rank] = peer
            else:
                peer.close()
    return peers


def _rank_of(peer: socket.socket, secret: str) -> int | None:
    """A caller's rank, or None where it is not one of ours."""
    peer.settimeout(WORD_S)
    with suppress(OSError, ValueError):
        said, number = peer.makefile("rb").readline(64).decode("ascii").split()
        return int(number) if secrets.compare_digest(said, secret) else None
    return None


def _own_address() -> str:
    """Where the other ranks can reach this host: as the host file says, else by its name."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts:
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[int(os.environ["MLX_RANK"])][0]
        return str(first).rpartition(":")[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR")
    return coordinator.rpartition(":")[0] if coordinator else socket.gethostbyname(socket.gethostname())
