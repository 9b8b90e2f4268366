"""``ring-mlx launch``: one command on several machines, or in several processes here, by mlx.launch."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ring_mlx.cli import INTERRUPTED, options
from ring_mlx.errors import OptionError

# Commands that know what to do with a part of a model.
COMMANDS = ("generate", "bench", "serve")
_ANY = " or ".join((", ".join(COMMANDS[:-1]), COMMANDS[-1]))
# mlx.launch says so of a rank that failed, and itself always exits with 0.
_FAILED = re.compile(rb"Node with rank \d+ (?:was killed|exited with code (-?\d+))")
# Its threads print a word at a time, so that what ends one such line may come after another.
_REST = re.compile(rb"(?:\x1b\[\d+m|\[WARN\]|\s)*")
KILLED = 1


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "launch", help="a command on several Macs that share a model", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--hosts", help="names for ssh, each with =IP if it has several addresses: mac1,mac2=10.0.0.2")
    parser.add_argument("-n", "--repeat-hosts", type=options.positive_int, default=1, help="processes a host (1)")
    parser.add_argument("--hostfile", help="a host file of mlx.launch or mlx.distributed_config in place of --hosts")
    parser.add_argument("--write-hostfile", help="where to keep the host file; with no command it is only written")
    parser.add_argument("--backend", help="of mx.distributed: ring, jaccl, mpi (what the host file says, else ring)")
    parser.add_argument("--starting-port", type=options.positive_int, default=32323, help="first of the ring (32323)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter on every host (this one)")
    parser.add_argument("--no-check", action="store_true", help="do not ask the hosts first what they have")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help=f"what to run, with its own options: {_ANY}"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the hosts, then run; returns the exit code of the first rank that failed, or 0."""
    from ring_mlx.distributed import hosts

    command = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if args.hosts and args.hostfile:
        raise OptionError("--hosts and --hostfile exclude each other; give one.")
    if command and command[0] not in COMMANDS:
        raise OptionError(f"{command[0]} does not run in several processes; give {_ANY}.")
    if not command and not args.write_hostfile:
        raise OptionError(f"no command given; put {_ANY} and its options last.")
    if args.hostfile:
        chosen = hosts.read_host_file(Path(args.hostfile))
    else:
        chosen = hosts.parse_hosts(args.hosts or hosts.LOCAL, args.repeat_hosts)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(args.hostfile or args.write_hostfile or Path(scratch) / "hosts.json")
        if not args.hostfile:
            hosts.write_host_file(path, chosen)
        if not command:
            return 0
        if not args.no_check:
            hosts.check_hosts(chosen, args.python, *_model(command))
        return _launch(
            [
                *(sys.executable, str(hosts.launcher()), "--hostfile", str(path), "--python", args.python),
                *("--starting-port", str(args.starting_port)),
                *(("--backend", args.backend) if args.backend else ()),
                *("--", "-P", "-m", "ring_mlx", *command),
            ]
        )


def _model(command: list[str]) -> tuple[str | None, str | None]:
    """--model and --revision of a command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--revision")
    found, _ = parser.parse_known_args(command[1:])
    return found.model, found.revision


def _launch(command: list[str]) -> int:
    """Run mlx.launch, pass its messages on, and find in them whether a rank failed."""
    code, explained = 0, False
    held: list[bytes] = []
    # A pipe that stays open: mlx.launch reads its input without a pause once that has ended. A session of its own, of
    # which every process here is told to end: mlx.launch would end itself and leave the ranks.
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as process,
        _signals_to(process) as told,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            if told and not line.startswith(b"ring-mlx: "):
                continue  # how mlx.launch itself takes it
            failed = _FAILED.search(line)
            if failed and not code:
                code = abs(int(failed[1] or KILLED)) or KILLED
            explained = explained or line.startswith(b"ring-mlx: [")
            if failed or (held and _REST.fullmatch(line)):
                held.append(line)  # may come before what explains it
                continue
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
    if not explained and not told:
        sys.stderr.buffer.writelines(held)
        sys.stderr.flush()
    return INTERRUPTED if told else code or process.returncode


@contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Ctrl-C and termination reach all processes of a session, as a terminal would have it; the second time they kill.

    Yields:
        The signals so far.
    """
    told: list[int] = []

    def tell(number: int, _: object) -> None:
        told.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if len(told) > 1 else signal.SIGINT)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
