"""The hosts that take part: their addresses, whether they are fit, and the host file of mlx.launch; starts no ranks."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ring_mlx.distributed.agreement import compare
from ring_mlx.distributed.failure import DistributedError
from ring_mlx.system.files import behind_links, read_bounded, write_named

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
    """Where a rank runs.

    Attributes:
        name: What ssh takes; 127.0.0.1 is this machine.
        ip: Where the other ranks reach it.
        more_ips: Further addresses of the same host.
        rdma: Its devices towards each rank, for JACCL.
    """

    name: str
    ip: str
    more_ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Raises DistributedError where ssh would not take the name for one."""
        if not self.name or self.name.startswith("-") or not self.name.isprintable() or " " in self.name:
            raise DistributedError(f"{self.name!r} is not a name of a host; correct it.")

    @property
    def is_local(self) -> bool:
        """Whether it is reached without ssh."""
        return self.name == LOCAL


def parse_hosts(text: str, repeats: int) -> list[Host]:
    """Hosts from ``name`` or ``name=ip``, separated by commas, each ``repeats`` times.

    Raises:
        DistributedError: If a name has no address.
    """
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
    """The host file that mlx.launch reads, for the ring backend.

    Raises:
        DistributedError: If it cannot be written.
    """
    entries = [{"ssh": h.name, "ips": [h.ip]} for h in hosts]
    try:
        write_named(path, json.dumps({"backend": "ring", "envs": [], "hosts": entries}, indent=2) + "\n")
    except OSError as e:
        raise DistributedError(f"{path} could not be written ({e}); give another path.") from None


def read_host_file(path: Path) -> list[Host]:
    """The hosts of a file by `write_host_file` or ``mlx.distributed_config``.

    Raises:
        DistributedError: If it is missing or not such a file.
    """
    try:
        data = _read(path)
        entries = data["hosts"] if isinstance(data, dict) else data
        hosts = [_host(e) for e in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _no_host_file(path, e) from None
    if len(hosts) < 2:
        raise DistributedError(f"{path} names {len(hosts)} hosts; two or more are needed.")
    _check_count(len(hosts))
    return hosts


def read_settings(path: Path) -> tuple[str, dict[str, str]]:
    """The backend that a host file names, or "", and its variables for every rank.

    Raises:
        DistributedError: If it is missing or not such a file.
    """
    try:
        data = _read(path)
        backend, envs = (data.get("backend") or "", data.get("envs") or []) if isinstance(data, dict) else ("", [])
        named = dict(str(e).partition("=")[::2] for e in envs)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise _no_host_file(path, e) from None
    wrong = [name for name, value in named.items() if not name or "\0" in name + value]
    if wrong:
        raise DistributedError(f"{path} has a variable {wrong[0]!r} among envs, which cannot be set; correct it.")
    return str(backend), named


def _check_count(count: int) -> None:
    if count > MOST_RANKS:
        raise DistributedError(f"{count} processes are more than {MOST_RANKS}; start fewer.")


def _read(path: Path) -> Any:
    return json.loads(read_bounded(behind_links(path), MOST_FILE_BYTES))


def _host(entry: Any) -> Host:
    if not isinstance(entry["ssh"], str):
        raise TypeError("a host's ssh is no text")
    ips = [str(ip) for ip in entry.get("ips") or [""]]
    return Host(entry["ssh"], ips[0], tuple(ips[1:]), tuple(entry.get("rdma") or ()))


def _no_host_file(path: Path, e: Exception) -> DistributedError:
    return DistributedError(f"{path} is not a host file ({e!r}); write one with `ring-mlx launch --hosts`.")


def check_hosts(hosts: Sequence[Host], python: str, model: str | None, revision: str | None) -> None:
    """Ask every host what it has, all at once.

    Raises:
        DistributedError: Naming, a line each put into one, the hosts that do not answer, lack the model, or have
            other versions or weights than the first.
    """
    distinct = list({h.name: h for h in hosts}.values())
    with ThreadPoolExecutor(len(distinct)) as pool, _Questions() as asked:
        found = pool.map(lambda h: _ask(h, python, model, revision, asked), distinct)
        answers = dict(zip((h.name for h in distinct), found, strict=True))
    for name, answer in answers.items():
        if answer.get("error"):
            raise DistributedError(f"host {name}: {answer['error']}")
    compare([answers[h.name] | {"host": h.name} for h in hosts])


class _Questions(list["subprocess.Popen[str]"]):
    """Processes that ask; they end with what an interrupt leaves behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self:
            process.kill()


def _ask(host: Host, python: str, model: str | None, revision: str | None, asked: _Questions) -> dict[str, Any]:
    """The answer of `ring_mlx.distributed.probe` there, or an error of our own."""
    command = [python, "-P", "-m", "ring_mlx.distributed.probe"]
    if not host.is_local:
        command = [*SSH, "--", host.name, shlex.join(command)]
    question = json.dumps({"model": model, "revision": revision, "cwd": os.getcwd()})
    try:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")
        asked.append(process)
        out, err = process.communicate(question, timeout=PROBE_S)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        return {"error": f"no answer ({e}); see that it is on and that `ssh {host.name}` works without a password."}
    answer = _last_record(out)
    if process.returncode == 0 and answer is not None:
        return answer
    said = (err.strip().splitlines() or ["nothing said"])[-1]
    if process.returncode == 255 and not host.is_local:
        return {"error": f"not reachable ({said}); see that `ssh {host.name}` works without a password."}
    return {"error": f"{python} -m ring_mlx failed there ({said}); install ring-mlx there, or name its --python."}


def _last_record(text: str) -> dict[str, Any] | None:
    """The last line that is a record; a shell there may say things before and after."""
    for line in reversed(text.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("versions"), dict):
            return record if isinstance(record.get("weights"), str) else None
    return None
