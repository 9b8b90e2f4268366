"""``ring-mlx launch``: one command on several machines, or in several processes here."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ring_mlx import options
from ring_mlx.cli.parsing import OneLineParser
from ring_mlx.distributed import hosts, launcher
from ring_mlx.distributed.hosts import Host
from ring_mlx.distributed.rank_process import Job
from ring_mlx.errors import OptionError

# Commands that know what to do with a part of a model.
COMMANDS = ("generate", "bench", "serve")
_ANY = " or ".join((", ".join(COMMANDS[:-1]), COMMANDS[-1]))


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", help="host names for ssh, with =IP where needed: mac1,mac2=10.0.0.2")
    parser.add_argument("-n", "--repeat-hosts", type=options.positive_int, default=1, help="processes per host (1)")
    parser.add_argument("--hostfile", help="a host file of mlx.launch or mlx.distributed_config, instead of --hosts")
    parser.add_argument("--write-hostfile", help="where to save the host file; without a command only this is done")
    parser.add_argument("--backend", help="ring, jaccl, jaccl-ring, nccl (what the host file says, else ring)")
    parser.add_argument(
        "--starting-port",
        type=options.positive_int,
        help="first port of the ring (32323; free ones if all ranks are here)",
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter on every host (this one)")
    parser.add_argument("--no-check", action="store_true", help="start without asking the hosts first")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help=f"what to run, with its own options: {_ANY}"
    )


def run(args: argparse.Namespace) -> int:
    """Check the hosts, then run; returns the exit code of the first rank that failed, or 0."""
    command = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if args.hosts and args.hostfile:
        raise OptionError("--hosts and --hostfile exclude each other; give one.")
    if command and command[0] not in COMMANDS:
        raise OptionError(f"{command[0]} does not run in several processes; give {_ANY}.")
    if not command and not args.write_hostfile:
        raise OptionError(f"no command given; put {_ANY} and its options last.")
    named, env = hosts.RING, dict[str, str]()
    if args.hostfile:
        chosen, named, env = hosts.read_host_file(Path(args.hostfile))
    else:
        chosen = hosts.parse_hosts(args.hosts or hosts.LOCAL, args.repeat_hosts)
        if args.write_hostfile:
            hosts.write_host_file(Path(args.write_hostfile), chosen)
    return _launch(args, command, chosen, named, env) if command else 0


def _launch(args: argparse.Namespace, command: list[str], chosen: list[Host], named: str, env: dict[str, str]) -> int:
    """Check the hosts, and run the command on them."""
    own, files = hosts.variables(args.backend or named or hosts.default_backend(), chosen, args.starting_port)
    told: list[int] = []
    with _signals_to(lambda number, _: told.append(number)):
        if not args.no_check:
            with _signals_to(signal.default_int_handler):
                hosts.check_hosts(chosen, args.python, *_model(command))
        return launcher.Launcher(told).run(chosen, Job(args.python, command, env | own, files))


def _model(command: list[str]) -> tuple[str | None, str | None]:
    """--model and --revision of a command."""
    parser = OneLineParser(prog=f"ring-mlx {command[0]}", add_help=False)
    parser.add_argument("--model")
    parser.add_argument("--revision")
    found, _ = parser.parse_known_args(command[1:])
    return found.model, found.revision


@contextmanager
def _signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """What asks to end goes to a handler, unless it is ignored: a shell's background job ignores SIGINT, ``nohup`` SIGHUP."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
