"""The hosts: the host file of mlx.launch, the needs of MLX's backends, and the comparison of versions and weights.

Needs no MLX except in `default_backend`, so that a host can launch without it.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ring_mlx
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.system.files import behind_links, read_bounded, write_named

RING = "ring"
STARTING_PORT, LAST_PORT, NCCL_PORT = 32323, 65535, 12345
LOCAL = "127.0.0.1"
# A host that is cut off is missed after 6 s. No terminal there, which would mix errors with answers.
SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=8", "-o", "LogLevel=ERROR"),
    *("-o", "ServerAliveInterval=2", "-o", "ServerAliveCountMax=3"),
)
MOST_RANKS, MOST_FILE_BYTES = 256, 16 << 20  # a rank's number is a byte where ranks tell who is lost
PROBE_S = 600  # a host may first have to read a model's headers from a slow disk, or download it


@dataclass(frozen=True)
class Host:
    name: str  # what ssh takes; 127.0.0.1 is this machine
    ip: str  # where the other ranks reach it
    more_ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()  # its devices towards each rank, for JACCL

    def __post_init__(self) -> None:
        # ssh would take such a name for an option or for words of a command.
        if not self.name or self.name.startswith("-") or not self.name.isprintable() or " " in self.name:
            raise DistributedError(f"{self.name!r} is not a name of a host; correct it.")

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL


def parse_hosts(text: str, repeats: int) -> list[Host]:
    """Hosts from ``name`` or ``name=ip``, separated by commas, each ``repeats`` times; raises DistributedError."""
    hosts = []
    for part in text.split(","):
        name, _, ip = part.strip().partition("=")
        name = LOCAL if name == "localhost" else name
        if not name:
            raise DistributedError(
                f"--hosts {text!r} has an empty name; give mac1,mac2 or mac1=10.0.0.1,mac2=10.0.0.2."
            )
        try:
            address = ip or socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
        except OSError as e:
            raise DistributedError(
                f"host {name} has no address ({e}); correct the name, or give it as {name}=IP."
            ) from None
        _check_count(repeats)
        hosts += [Host(name, str(address))] * repeats
    _check_count(len(hosts))
    if len(hosts) < 2:
        raise DistributedError("one process needs no launching; give several --hosts, or -n 2 for two processes here.")
    if len({h.name for h in hosts}) > 1 and any(h.ip.startswith("127.") for h in hosts):
        mine = next(h.name for h in hosts if h.ip.startswith("127."))
        raise DistributedError(f"host {mine} is at a loopback address, which others cannot reach; give {mine}=IP.")
    return hosts


def write_host_file(path: Path, hosts: Sequence[Host]) -> None:
    """Write the host file that mlx.launch reads, for the ring backend; raises DistributedError if it cannot be written."""
    entries = [{"ssh": h.name, "ips": [h.ip]} for h in hosts]
    try:
        write_named(path, json.dumps({"backend": "ring", "envs": [], "hosts": entries}, indent=2) + "\n")
    except OSError as e:
        raise DistributedError(f"{path} could not be written ({e}); give another path.") from None


def read_host_file(path: Path) -> tuple[list[Host], str, dict[str, str]]:
    """The hosts of a file of ``mlx.distributed_config``, its backend or "", and its variables; raises DistributedError.

    MLX's own reader is not used: it leaves the file open, and reads it without a limit.
    """
    try:
        data = json.loads(read_bounded(behind_links(path), MOST_FILE_BYTES))
        data = data if isinstance(data, dict) else {"hosts": data}
        hosts = [_host(e) for e in data["hosts"]]
        envs = dict(str(e).partition("=")[::2] for e in data.get("envs") or [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DistributedError(
            f"{path} is not a host file ({e!r}); write one with `ring-mlx launch --hosts`."
        ) from None
    if len(hosts) < 2:
        raise DistributedError(f"{path} names {len(hosts)} hosts; two or more are needed.")
    _check_count(len(hosts))
    wrong = [name for name, value in envs.items() if not name or "\0" in name + value]
    if wrong:
        raise DistributedError(f"{path} has a variable {wrong[0]!r} among envs, which cannot be set; correct it.")
    return hosts, str(data.get("backend") or ""), envs


def _check_count(count: int) -> None:
    if count > MOST_RANKS:
        raise DistributedError(f"{count} processes are more than {MOST_RANKS}; start fewer.")


def _host(entry: Any) -> Host:
    if not isinstance(entry["ssh"], str):
        raise TypeError("a host's ssh is no text")
    ips = [str(ip) for ip in entry.get("ips") or [""]]
    return Host(entry["ssh"], ips[0], tuple(ips[1:]), tuple(entry.get("rdma") or ()))


def default_backend() -> str:
    """The backend if the host file names none."""
    import mlx.core as mx

    return "nccl" if mx.cuda.is_available() else RING


def variables(backend: str, hosts: Sequence[Host], starting_port: int | None) -> tuple[dict[str, str], dict[str, str]]:
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
    """A port for each address; without a first one free ports if all ranks are here."""
    count = sum(1 + len(h.more_ips) for h in hosts)
    if starting_port is None and all(h.is_local for h in hosts):
        return _free_ports(count)
    first = starting_port or STARTING_PORT
    if first + count - 1 > LAST_PORT:
        raise DistributedError(f"--starting-port {first} leaves no room for {count} ports; give a lower one.")
    return range(first, first + count)


def _free_ports(count: int) -> range:
    """Neighbouring free ports, below those that systems give out by themselves."""
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


def versions() -> dict[str, str]:
    """Versions that must be the same everywhere."""
    return {"ring-mlx": ring_mlx.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


def compare(records: list[dict[str, Any]]) -> None:
    """Raises DistributedError where a record with ``host``, ``versions`` and ``weights`` differs from the first."""
    first = records[0]
    for rank, r in enumerate(records):
        for name, wanted in first["versions"].items():
            seen = r["versions"].get(name)
            if seen != wanted:
                raise DistributedError(
                    f"rank {rank} ({r['host']}) has {name} {seen}, rank 0 ({first['host']}) {wanted}; install the same."
                )
        if r["weights"] != first["weights"]:
            raise DistributedError(
                f"rank {rank} ({r['host']}) has other weights than rank 0 ({first['host']}): fingerprints "
                f"{r['weights'][:8]} and {first['weights'][:8]}; copy the same checkpoint to both."
            )


def check_hosts(hosts: Sequence[Host], python: str, model: str | None, revision: str | None) -> None:
    """Ask all hosts for versions and weights.

    Raises DistributedError where one does not answer, lacks the model, or has other versions or weights than the first.
    """
    question = json.dumps({"model": model, "revision": revision, "cwd": os.getcwd()})
    # Those elsewhere first: one that cannot be reached says so soon.
    distinct = sorted({h.name: h for h in hosts}.values(), key=lambda h: h.is_local)
    with ExitStack() as asked:
        processes = [_ask(host, python, question, asked) for host in distinct]
        answers = {h.name: _answer(h, python, process) for h, process in zip(distinct, processes, strict=True)}
    compare([answers[h.name] | {"host": h.name} for h in hosts])


def _ask(host: Host, python: str, question: str, asked: ExitStack) -> subprocess.Popen[str]:
    """Start `ring_mlx.distributed.probe` there; an interrupt ends it too."""
    command = [python, "-P", "-m", "ring_mlx.distributed.probe"]
    if not host.is_local:
        command = [*SSH, "--", host.name, shlex.join(command)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")
    except (OSError, ValueError) as e:
        raise _unanswered(host, e) from None
    asked.enter_context(process)
    asked.callback(process.kill)
    assert process.stdin is not None
    with suppress(OSError), process.stdin as stdin:  # closed, so that all hosts work at once
        stdin.write(question)
    process.stdin = None
    return process


def _answer(host: Host, python: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=PROBE_S)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise _unanswered(host, e) from None
    answer = _last_record(out)
    if process.returncode == 0 and answer is not None:
        if answer.get("error"):
            raise DistributedError(f"host {host.name}: {answer['error']}")
        return answer
    said = (err.strip().splitlines() or ["nothing said"])[-1]
    if process.returncode == 255 and not host.is_local:
        what = f"not reachable ({said}); see that `ssh {host.name}` works without a password."
    else:
        what = f"{python} -m ring_mlx failed there ({said}); install ring-mlx there, or name its --python."
    raise DistributedError(f"host {host.name}: {what}")


def _unanswered(host: Host, e: Exception) -> DistributedError:
    why = f"no answer ({e}); see that it is on and that `ssh {host.name}` works without a password."
    return DistributedError(f"host {host.name}: {why}")


def _last_record(text: str) -> dict[str, Any] | None:
    """The last line that is a record; a shell may print lines before and after."""
    for line in reversed(text.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("versions"), dict):
            return record if isinstance(record.get("weights"), str) else None
    return None
