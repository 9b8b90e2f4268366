"""The group of processes that share a model: joining it, and exchanging small records over it or over sockets.

Records are JSON. mlx-lm shares pickled objects, which would run what another host sends.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.errors import RingError

RECORD_BYTES = 1 << 15
# From when this process starts, and from when all are known to have started.
JOIN_S, JOIN_TOGETHER_S = 120.0, 20.0
CALL_S, WORD_S = 60.0, 6.0

Sampler = Callable[[mx.array], mx.array]


def is_launched() -> bool:
    """Whether this process was started as one of several, by ``mlx.launch`` or by hand."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if "MLX_RANK" in os.environ and hosts:
        try:
            return len(json.loads(Path(hosts).read_text(encoding="utf-8"))) > 1
        except (OSError, ValueError):
            return False
    names = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
    return "MLX_JACCL_COORDINATOR" in os.environ or any(int(os.environ.get(n) or 1) > 1 for n in names)


def join(within_s: float = JOIN_S) -> mx.distributed.Group:
    """The group that the environment describes; SIGALRM ends the process if the others do not join in time.

    Raises DistributedError if MLX cannot make it, or it is this process alone.
    """
    # MLX waits in C++ with the interpreter's lock, so that neither a thread nor a handler in Python could end it.
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, within_s)
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as e:
        rank = os.environ.get("MLX_RANK", "?")
        raise DistributedError(f"rank {rank} could not join the others ({e}); see that all were started.") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if group.size() < 2:
        raise DistributedError("this process is alone; start several with `ring-mlx launch`.")
    return group


def exchange(group: mx.distributed.Group, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all ranks, in order; each at most 32 KiB as JSON."""
    data = json.dumps(record).encode()[:RECORD_BYTES].ljust(RECORD_BYTES)
    # On the CPU whatever the default device: it is text, and MLX's backends for it run there.
    everything = mx.distributed.all_gather(mx.array(np.frombuffer(data, np.uint8)), group=group, stream=mx.cpu)
    mx.eval(everything)
    rows = np.asarray(everything).reshape(group.size(), RECORD_BYTES)
    return [json.loads(row.tobytes()) for row in rows]


@contextmanager
def together(group: mx.distributed.Group) -> Iterator[dict[str, Any]]:
    """Work of every rank that fails on all if it fails on one: DistributedError names the first failure.

    Gives a record for the others; at the end its ``"all"`` holds those of all ranks.
    """
    own: dict[str, Any] = {}
    error: RingError | None = None
    try:
        yield own
    except RingError as e:
        error = e
    own["all"] = exchange(group, {**own, "host": socket.gethostname(), "error": str(error)[:2000] if error else None})
    errors = [r["error"] for r in own["all"]]
    if not any(errors):
        return
    if error is None or len(set(errors)) > 1:
        rank = next(rank for rank, said in enumerate(errors) if said)
        error = DistributedError(f"rank {rank} ({own['all'][rank]['host']}) failed: {errors[rank]}")
    raise error


def agreed(sampler: Sampler, group: mx.distributed.Group) -> Sampler:
    """A sampler that gives every rank rank 0's tokens, whatever chips and seeds the others have."""
    return lambda logprobs: of_first(sampler(logprobs), group)


def of_first(ids: mx.array, group: mx.distributed.Group) -> mx.array:
    """Rank 0's ids on every rank, in their own shape; int32."""
    # Not zeros of their own: what leads to the ids holds sums over ranks, which every rank must compute.
    own = ids.astype(mx.int32) * (1 if group.rank() == 0 else 0)
    return mx.distributed.all_sum(own, group=group)


def greatest(number: int, group: mx.distributed.Group) -> int:
    """The greatest of all ranks' numbers; returns once every rank has called it."""
    return max(int(record["number"]) for record in exchange(group, {"number": number}))


class Channel:
    """Lines of JSON from rank 0 to all others, over connected sockets.

    MLX's backends poll while they wait, and a server may wait for hours: waiting here takes no processor.
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
            raise ConnectionError("rank 0 closed the connection")
        return json.loads(line)


def connect(group: mx.distributed.Group) -> tuple[dict[int, socket.socket], list[str]]:
    """Sockets between rank 0 and each other by rank, and the names of all hosts; every rank must call it."""
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
