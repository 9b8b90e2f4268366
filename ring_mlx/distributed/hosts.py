"""The hosts that take part: their addresses, whether they are fit, and mlx.launch's host file; starts no ranks."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_mlx.distributed.failure import DistributedError

LOCAL = "127.0.0.1"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
PROBE_S = 600  # a host may first have to read a model's headers from a slow disk, or download it


@dataclass(frozen=True)
class Host:
    """Where a rank runs.

    Attributes:
        name: What ssh takes; 127.0.0.1 is this machine.
        ip: Where the other ranks reach it.
    """

    name: str
    ip: str

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
        hosts += [Host(name, str(address))] * repeats
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
        path.write_text(
            json.dumps({"backend": "ring", "envs": [], "hosts": entries}, indent=2) + "\n", encoding="utf-8"
        )
    except OSError as e:
        raise DistributedError(f"{path} could not be written ({e}); give another path.") from None


def read_host_file(path: Path) -> list[Host]:
    """The hosts of a file by `write_host_file` or ``mlx.distributed_config``.

    Raises:
        DistributedError: If it is missing or not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = data["hosts"] if isinstance(data, dict) else data
        hosts = [Host(str(e["ssh"]), str((e.get("ips") or [""])[0])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DistributedError(
            f"{path} is not a host file ({e!r}); write one with `ring-mlx launch --hosts`."
        ) from None
    if len(hosts) < 2:
        raise DistributedError(f"{path} names {len(hosts)} hosts; two or more are needed.")
    return hosts


def check_hosts(hosts: Sequence[Host], python: str, model: str | None, revision: str | None) -> None:
    """Ask every host what it has, all at once.

    Raises:
        DistributedError: Naming, a line each put into one, the hosts that do not answer, lack the model, or have
            other versions or weights than the first.
    """
    from ring_mlx.distributed.loading import difference

    distinct = list(dict.fromkeys(h for h in hosts))
    with ThreadPoolExecutor(len(distinct)) as pool:
        answers = dict(zip(distinct, pool.map(lambda h: _ask(h, python, model, revision), distinct), strict=True))
    for host, answer in answers.items():
        if answer.get("error"):
            raise DistributedError(f"host {host.name}: {answer['error']}")
    found = difference([answers[h] | {"host": h.name} for h in hosts])
    if found:
        raise DistributedError(found)


def _ask(host: Host, python: str, model: str | None, revision: str | None) -> dict[str, Any]:
    """The answer of `ring_mlx.distributed.probe` there, or an error of our own."""
    command = [python, "-P", "-m", "ring_mlx.distributed.probe"]
    for flag, value in (("--model", model), ("--revision", revision)):
        command += [flag, value] if value else []
    if not host.is_local:
        command = [*SSH, host.name, shlex.join(command)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"error": f"no answer ({e}); see that it is on and that `ssh {host.name}` works without a password."}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    if done.returncode == 255 and not host.is_local:
        return {"error": f"not reachable ({said}); see that `ssh {host.name}` works without a password."}
    return {"error": f"{python} -m ring_mlx failed there ({said}); install ring-mlx there, or name its --python."}


def launcher() -> Path:
    """The ``mlx.launch`` that belongs to this interpreter.

    Raises:
        DistributedError: If there is none.
    """
    path = Path(sys.executable).parent / "mlx.launch"
    if not path.is_file():
        raise DistributedError(f"no {path}; reinstall mlx there.")
    return path
