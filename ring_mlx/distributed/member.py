"""A command's place among ranks: joins them, watches them, loads its part; knows options, not how a model is cut.

Rank 0 alone prints. An error that every rank meets is said once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_mlx.distributed.failure import DistributedError
from ring_mlx.errors import OptionError, RingError

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ring_mlx.distributed.group import Sampler
    from ring_mlx.distributed.watch import Watch
    from ring_mlx.model import Model

AUTO = "auto"
CHOICES = (AUTO, "tensor", "pipeline")
BAD_INPUT = 2
REFUSED = {
    "prompt": "standard input goes to one process only; give the text itself",
    "prompt_cache_file": "it holds a whole cache, of which a rank has a part; leave it out",
    "expert_cache_bytes": "each rank holds its part of the experts; leave it out",
}
# How long a rank waits for rank 0 to fail in the same way before it speaks itself.
ECHO_S = 1.0


@dataclass
class Member:
    """This process as one of several."""

    group: mx.distributed.Group
    mode: str
    watch: Watch

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints."""
        return self.group.rank() == 0

    def load(self, name: str, revision: str | None = None, exact: bool = False) -> tuple[Model, TokenizerWrapper]:
        """This rank's part of a folder or hub repository, and the tokenizer.

        Raises:
            RingError: As `ring_mlx.load` and `load_sharded`.
        """
        from ring_mlx.distributed.group import together
        from ring_mlx.distributed.loading import load_sharded
        from ring_mlx.hub import resolve_model
        from ring_mlx.tokenizer import load_tokenizer

        with together(self.group):
            folder = resolve_model(name, revision)
            tokenizer = load_tokenizer(folder)
        return load_sharded(folder, self.group, self._fitting_mode(folder), exact=exact), tokenizer

    def check(self, args: argparse.Namespace) -> None:
        """Raises OptionError where options of ``generate`` do not suit several processes."""
        for name, reason in REFUSED.items():
            value = getattr(args, name, None)
            if value not in (None, False) and (name != "prompt" or value == "-"):
                raise OptionError(f"--{name.replace('_', '-')} does not work in several processes: {reason}.")

    def load_named(self, args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str]:
        """As `ring_mlx.cli.options.load_named`."""
        from ring_mlx.loading import demo_model_path

        name = args.model or str(demo_model_path())
        return *self.load(name, args.revision, args.exact), name

    def agreed(self, sampler: Sampler) -> Sampler:
        """A sampler that gives rank 0's tokens on every rank."""
        from ring_mlx.distributed.group import agreed

        return agreed(sampler, self.group)

    def _fitting_mode(self, folder: Path) -> str:
        """The mode that was asked for; with "auto", tensor where the model can be cut so, else pipeline."""
        from ring_mlx.config import read_config
        from ring_mlx.convert.source_files import local_tensors
        from ring_mlx.distributed.group import together
        from ring_mlx.distributed.loading import plan_part

        if self.mode != AUTO:
            return self.mode
        mode = "tensor"
        with together(self.group):
            config, raw = read_config(folder)
            try:
                plan_part(raw, config, local_tensors(folder), mode, self.group)
            except DistributedError as e:
                mode = "pipeline"
                if self.is_first:
                    print(f"ring-mlx: note: {e} A pipeline is used instead.", file=sys.stderr)
        return mode


@contextmanager
def joined(mode: str) -> Iterator[Member | None]:
    """This process's place while a command runs, or None where it is alone.

    Raises:
        DistributedError: If a mode is asked for and this process is alone, or the others cannot be reached.
    """
    from ring_mlx.distributed import group as groups

    if not groups.is_launched():
        if mode != AUTO:
            raise DistributedError(f"--distributed {mode} needs several processes; start them with `ring-mlx launch`.")
        yield None
        return
    group = groups.join()
    watch = _watch(group)
    is_first = group.rank() == 0
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first else nowhere):
            yield Member(group, mode, watch)
    except RingError:
        if not is_first and watch.first_failed.wait(ECHO_S):
            raise SystemExit(BAD_INPUT) from None
        watch.close(b"f")
        raise
    except RuntimeError as e:
        if not str(e).startswith("["):
            raise
        # A backend that has lost a peer says so at once; the watch knows which, and ends this process.
        watch.first_failed.wait(8.0)
        raise DistributedError(f"rank {group.rank()} has lost another ({e}); start all again.") from None
    watch.close()


def _watch(group: Any) -> Watch:
    from ring_mlx.distributed import watch
    from ring_mlx.distributed.group import exchange

    rank, size = group.rank(), group.size()
    server, word, address = None, "", ""
    if rank == 0:
        address = _own_address()
        server, word = watch.listen(address)
    port = server.getsockname()[1] if server else 0
    records = exchange(group, {"host": socket.gethostname(), "address": address, "port": port, "word": word})
    first = records[0]
    try:
        if server is not None:
            peers = watch.accept(server, word, size)
        else:
            peers = watch.call(first["address"], first["port"], first["word"], rank)
    except OSError as e:
        raise DistributedError(
            f"rank {rank} cannot reach rank 0 ({first['host']}, {first['address']}:{first['port']}: {e}); allow "
            "connections between them in the firewall."
        ) from None
    return watch.Watch(rank, peers, [r["host"] for r in records])


def _own_address() -> str:
    """Where the other ranks can reach this host: as the host file says, else by its name."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts:
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[int(os.environ["MLX_RANK"])][0]
        return str(first).rpartition(":")[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR")
    return coordinator.rpartition(":")[0] if coordinator else socket.gethostbyname(socket.gethostname())
