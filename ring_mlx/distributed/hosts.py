"""The hosts that take part: their addresses, the host file of mlx.launch, and whether they are fit."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Where a rank runs."""

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
        """Whether it is reached without ssh."""
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
    """The host file that mlx.launch reads, for the ring backend; raises DistributedError where the disk refuses it."""
    entries = [{"ssh": h.name, "ips": [h.ip]} for h in hosts]
    try:
        write_named(path, json.dumps({"backend": "ring", "envs": [], "hosts": entries}, indent=2) + "\n")
    except OSError as e:
        raise DistributedError(f"{path} could not be written ({e}); give another path.") from None


def read_host_file(path: Path) -> tuple[list[Host], str, dict[str, str]]:
    """The hosts of a file by `write_host_file` or ``mlx.distributed_config``, its backend or "", and its variables.

    MLX's own reader leaves the file open, and reads whatever is there to its end.

    Raises:
        DistributedError: If it is missing or not such a file.
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


def check_hosts(hosts: Sequence[Host], python: str, model: str | None, revision: str | None) -> None:
    """Ask every host what it has, all at once.

    Raises:
        DistributedError: In one line: the first host that does not answer, lacks the model, or has other versions or
            weights than the first.
    """
    question = json.dumps({"model": model, "revision": revision, "cwd": os.getcwd()})
    distinct = {h.name: h for h in hosts}
    with ExitStack() as asked:
        processes = {name: _ask(host, python, question, asked) for name, host in distinct.items()}
        answers = {name: _answer(host, python, processes[name]) for name, host in distinct.items()}
    compare([answers[h.name] | {"host": h.name} for h in hosts])


def _ask(host: Host, python: str, question: str, asked: ExitStack) -> subprocess.Popen[str]:
    """Start `ring_mlx.distributed.probe` there; it ends with what an interrupt leaves behind."""
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
    """The last line that is a record; a shell there may say things before and after."""
    for line in reversed(text.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("versions"), dict):
            return record if isinstance(record.get("weights"), str) else None
    return None
