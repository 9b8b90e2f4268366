"""The environment variables through which MLX's backends find the other ranks, as mlx.launch sets them."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.distributed.hosts import Host

RING = "ring"
STARTING_PORT, LAST_PORT, NCCL_PORT = 32323, 65535, 12345


def default() -> str:
    """What is used where a host file names no backend."""
    # Not at the top: a host that only launches needs no MLX.
    import mlx.core as mx

    return "nccl" if mx.cuda.is_available() else RING


def describe(backend: str, hosts: Sequence[Host], starting_port: int | None) -> tuple[dict[str, str], dict[str, str]]:
    """Variables that are the same on every rank, and the contents of files that variables name.

    Raises DistributedError if the hosts, one a rank, lack what the backend needs, or it is unknown.
    """
    missing = next((h.name for h in (hosts if backend == RING else hosts[:1]) if not h.ip), None)
    if missing is not None:
        raise DistributedError(f"host {missing} has no address in the host file; add one to its ips.")
    if backend == RING:
        ports = iter(_ports(hosts, starting_port))
        addresses = [[f"{ip}:{next(ports)}" for ip in (h.ip, *h.more_ips)] for h in hosts]
        return {}, {"MLX_HOSTFILE": json.dumps(addresses)}
    if backend in ("jaccl", "jaccl-ring"):
        _check_rdma(hosts, is_ring=backend != "jaccl")
        env = {"MLX_JACCL_COORDINATOR": f"{hosts[0].ip}:{starting_port or STARTING_PORT}"}
        env |= {"MLX_JACCL_RING": "1"} if backend != "jaccl" else {}
        return env, {"MLX_IBV_DEVICES": json.dumps([h.rdma for h in hosts])}
    if backend == "nccl":
        sizes = {"NCCL_PORT": str(NCCL_PORT), "MLX_WORLD_SIZE": str(len(hosts)), "CUDA_VISIBLE_DEVICES": "0"}
        return {"NCCL_HOST_IP": hosts[0].ip, **sizes}, {}
    raise DistributedError(
        f"backend {backend} is not started here; give ring, jaccl, jaccl-ring or nccl, or run `mpirun -n 2 python -m "
        "ring_mlx` with the command."
    )


def _ports(hosts: Sequence[Host], starting_port: int | None) -> range:
    """One for each address; without a first one free ones, where all ranks are here."""
    count = sum(1 + len(h.more_ips) for h in hosts)
    if starting_port is None and all(h.is_local for h in hosts):
        return _free_ports(count)
    first = starting_port or STARTING_PORT
    if first + count - 1 > LAST_PORT:
        raise DistributedError(f"--starting-port {first} leaves no room for {count} ports; give a lower one.")
    return range(first, first + count)


def _free_ports(count: int) -> range:
    """Ports that follow each other, below those that systems give to everybody who asks for any."""
    for _ in range(1000):
        ports = range(first := random.randrange(20000, 32000), first + count)
        with ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return ports
    raise DistributedError(f"no {count} free ports between 20000 and 32000 here; give a --starting-port.")


def _check_rdma(hosts: Sequence[Host], is_ring: bool) -> None:
    """Raises DistributedError where a device that JACCL needs is not named."""
    size = len(hosts)
    for i, host in enumerate(hosts):
        needed = {(i - 1) % size, (i + 1) % size} if is_ring else set(range(size))
        wrong = ""
        if len(host.rdma) != size or host.rdma[i] is not None:
            wrong = f"must have {size} entries and null at {i}"
        elif without := [hosts[j].name for j in sorted(needed - {i}) if host.rdma[j] is None]:
            wrong = f"names no device to {without[0]}"
        if wrong:
            raise DistributedError(
                f"rdma of host {host.name} {wrong}; write the host file with mlx.distributed_config."
            )
