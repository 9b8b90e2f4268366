"""A command's place among ranks: joins them, watches them, loads its part.

Rank 0 alone prints. An error that every rank meets is said by all, of which the launcher passes on one line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.bench.config import Ranks
from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.distributed import group as groups
from ring_mlx.distributed import lifeline as lifelines
from ring_mlx.distributed import watch as watches
from ring_mlx.distributed.drawing import random_sharded, shapes
from ring_mlx.distributed.ending import LOST
from ring_mlx.distributed.failure import DistributedError, LostError
from ring_mlx.distributed.group import Sampler, exchange
from ring_mlx.distributed.loading import load_sharded, plan_part
from ring_mlx.distributed.orders import Orders
from ring_mlx.distributed.plan import AUTO
from ring_mlx.distributed.watch import Watch
from ring_mlx.errors import OptionError
from ring_mlx.model.config import RingConfig, read_config
from ring_mlx.model.model import Model
from ring_mlx.system.terminal_text import note

REFUSED = {
    "prompt": "standard input goes to one process only; give the text itself",
    "prompt_cache_file": "it holds a whole cache, of which a rank has a part; leave it out",
    "adapter_path": "it would have to be cut as the weights are; fuse it first, with `ring-mlx mlx-lm fuse`",
    "expert_cache_bytes": "each rank holds its part of the experts; leave it out",
    "vs": "mlx-lm would need the whole model; measure it in one process",
    "floor": "the limits are those of one machine and a whole model; measure them in one process",
    "ops": "what passes between ranks would not be counted; count in one process",
    "cache_dir": "snapshots are kept in memory only; leave it out",
}
# How long a rank that has lost another waits for the watch, which knows which.
LOST_S = 8.0


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

    def load(
        self,
        name: str | os.PathLike[str],
        revision: str | None = None,
        exact: bool = False,
        decay_layer_offset: int | str | None = None,
    ) -> tuple[Model, TokenizerWrapper]:
        """This rank's part of a folder or hub repository, and the tokenizer; `mode` is what it is cut by then.

        Raises:
            RingError: As `ring_mlx.load` and `load_sharded`.
        """
        with self.together():
            folder = resolve_model(name, revision)
            tokenizer = load_tokenizer(folder)
        return self.load_folder(folder, exact, decay_layer_offset), tokenizer

    def load_folder(self, folder: Path, exact: bool = False, decay_layer_offset: int | str | None = None) -> Model:
        """This rank's part of the model in a folder, without a tokenizer; `mode` is what it is cut by then.

        Raises:
            RingError: As `load_sharded`.
        """
        if self.mode == AUTO:
            with self.together():
                config, raw = read_config(folder)
                self._settle_mode(raw, config, read_tensors(folder))
        return load_sharded(folder, self.group, self.mode, exact=exact, decay_layer_offset=decay_layer_offset)

    def draw(self, raw: dict[str, Any], name: str, bits: int | None, dtype: mx.Dtype, exact: bool, seed: int) -> Model:
        """This rank's part of a model with random weights; `mode` is what it is cut by then.

        Raises:
            RingError: As `random_sharded`.
        """
        if self.mode == AUTO:
            with self.together():
                self._settle_mode(*shapes(raw, bits, exact))
        return random_sharded(raw, name, bits, self.group, self.mode, dtype=dtype, exact=exact, seed=seed)

    def check(self, args: argparse.Namespace) -> None:
        """Raises OptionError where options of a command do not suit several processes."""
        with self.together():
            for name, reason in REFUSED.items():
                value = getattr(args, name, None)
                if value not in (None, False) and (name != "prompt" or value == "-"):
                    raise OptionError(f"--{name.replace('_', '-')} does not work in several processes: {reason}.")

    def load_named(self, args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str]:
        """As `ring_mlx.cli.from_options.load_named`."""
        name = args.model or str(demo_model_path())
        return *self.load(name, args.revision, args.exact, args.decay_layer_offset), name

    def agreed(self, sampler: Sampler) -> Sampler:
        """A sampler that gives rank 0's tokens on every rank."""
        return groups.agreed(sampler, self.group)

    def ranks(self) -> Ranks:
        """The other ranks as a benchmark asks for them."""
        return Ranks(
            count=self.group.size(),
            mode=lambda: self.mode,
            greatest=lambda number: groups.greatest(number, self.group),
            agree=lambda ids: groups.of_first(ids, self.group),
            together=self.together,
        )

    def together(self) -> AbstractContextManager[dict[str, Any]]:
        """Work that every rank does and that fails on all if it fails on one."""
        return groups.together(self.group)

    def orders(self) -> Orders:
        """A way for rank 0 to tell the others what to do; every rank must ask for it.

        Raises:
            DistributedError: If one cannot be reached.
        """
        peers, _ = _connect(self.group)
        return Orders(peers.values())

    def lost(self, e: Exception) -> DistributedError:
        """What to say where a step failed; the watch says it first, and ends this process, if it misses a rank."""
        rank = self.group.rank()
        if not isinstance(e, OSError) and not (isinstance(e, RuntimeError) and str(e).startswith("[")):
            words = " ".join(str(e).split())[:300]
            return DistributedError(f"rank {rank} failed within a step ({type(e).__name__}: {words}); start all again.")
        time.sleep(LOST_S)
        return LostError(f"rank {rank} has lost another ({e}); start all again.")

    def _settle_mode(self, raw: dict[str, Any], config: RingConfig, tensors: Any) -> None:
        """Tensor where the model can be cut so, else pipeline."""
        self.mode = "tensor"
        try:
            plan_part(raw, config, tensors, self.mode, self.group)
        except DistributedError as e:
            self.mode = "pipeline"
            if self.is_first:
                note(f"note: {e} A pipeline is used instead.")


@contextmanager
def joined(mode: str) -> Iterator[Member | None]:
    """This process's place while a command runs, or None where it is alone.

    Raises:
        DistributedError: If a mode is asked for and this process is alone, or the others cannot be reached.
    """
    if not groups.is_launched():
        if mode != AUTO:
            raise DistributedError(f"--distributed {mode} needs several processes; start them with `ring-mlx launch`.")
        yield None
        return
    lifeline = lifelines.hold()
    if lifeline is not None:
        lifeline.all_started.wait()  # MLX looks for the others with pauses that grow
    group = groups.join(groups.JOIN_S if lifeline is None else groups.JOIN_TOGETHER_S)
    if lifeline is not None:
        lifeline.joined()
    watch = Watch(group.rank(), *_connect(group))
    member = Member(group, mode, watch)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if member.is_first else nowhere):
            yield member
    except BaseException as e:
        _leave(member, e)
        raise
    watch.close()


def _leave(member: Member, e: BaseException) -> None:
    """Tell the others that this rank ends with an error; raises SystemExit where enough has been said of it."""
    if isinstance(e, RuntimeError) and str(e).startswith("["):
        # A backend that has lost a peer says so at once; the watch knows which, and ends this process.
        e = member.lost(e)
    member.watch.fail()
    if isinstance(e, LostError):
        print(f"ring-mlx: {e}", file=sys.stderr)
        raise SystemExit(LOST) from None


def _connect(group: Any) -> tuple[dict[int, socket.socket], list[str]]:
    """Sockets between rank 0 and each other, and the names of all hosts."""
    rank, size = group.rank(), group.size()
    server, word, address = None, "", ""
    if rank == 0:
        address = _own_address()
        server, word = watches.listen(address)
    port = server.getsockname()[1] if server else 0
    records = exchange(group, {"host": socket.gethostname(), "address": address, "port": port, "word": word})
    first = records[0]
    try:
        if server is not None:
            peers = watches.accept(server, word, size)
        else:
            peers = watches.call(first["address"], first["port"], first["word"], rank)
    except OSError as e:
        raise DistributedError(
            f"rank {rank} cannot reach rank 0 ({first['host']}, {first['address']}:{first['port']}: {e}); allow "
            "connections between them in the firewall."
        ) from None
    return peers, [r["host"] for r in records]


def _own_address() -> str:
    """Where the other ranks can reach this host: as the host file says, else by its name."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts:
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[int(os.environ["MLX_RANK"])][0]
        return str(first).rpartition(":")[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR")
    return coordinator.rpartition(":")[0] if coordinator else socket.gethostbyname(socket.gethostname())
