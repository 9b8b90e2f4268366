"""This process as one rank of several: joins the others, watches them, loads its part.

Only rank 0 prints. An error of every rank is printed by all; the launcher shows it once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ring_mlx.checkpoint.hub import resolve_model
from ring_mlx.checkpoint.loading import demo_model_path
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.distributed import AUTO, PIPELINE, TENSOR, heartbeat
from ring_mlx.distributed import group as groups
from ring_mlx.distributed.failure import LOST, DistributedError, LostError
from ring_mlx.distributed.group import Channel, connect
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.distributed.pipeline import Stage
from ring_mlx.errors import OptionError
from ring_mlx.model.model import Model

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
# How long a rank that has lost another waits for the heartbeat, which knows which.
LOST_S = 8.0


@dataclass
class Rank:
    """This process as one of several; ``mode`` is how they share a model, which "auto" leaves to `share`."""

    group: mx.distributed.Group
    mode: str
    heartbeat: heartbeat.RankHeartbeat

    @property
    def is_first(self) -> bool:
        return self.group.rank() == 0

    def check(self, args: argparse.Namespace) -> None:
        """Raises OptionError for options that do not work in several processes."""
        with self.together():
            for name, reason in REFUSED.items():
                value = getattr(args, name, None)
                if value not in (None, False) and (name != "prompt" or value == "-"):
                    raise OptionError(f"--{name.replace('_', '-')} does not work in several processes: {reason}.")

    def load(self, name: str | os.PathLike[str], revision: str | None, **how: Any) -> tuple[Model, TokenizerWrapper]:
        """This rank's part of a folder or hub repository, and the tokenizer; ``how`` is for `load_sharded`."""
        with self.together():
            folder = resolve_model(name, revision)
            tokenizer = load_tokenizer(folder)
        return self.share(partial(load_sharded, folder, **how)), tokenizer

    def share(self, load: Callable[[mx.distributed.Group, str], Model]) -> Model:
        """This rank's part of a model, by a function of the group and the mode."""
        model = load(self.group, self.mode)
        self.mode = PIPELINE if isinstance(model.model, Stage) else TENSOR
        return model

    def load_named(self, args: argparse.Namespace) -> tuple[Model, TokenizerWrapper, str]:
        name = args.model or str(demo_model_path())
        how = {"exact": args.exact, "decay_layer_offset": args.decay_layer_offset}
        return *self.load(name, args.revision, **how), name

    def together(self) -> AbstractContextManager[dict[str, Any]]:
        """Work of every rank that fails on all if it fails on one."""
        return groups.together(self.group)

    def channel(self) -> Channel:
        """A channel from rank 0 to the others; every rank must call it. Raises DistributedError if one is not reached."""
        return Channel(connect(self.group)[0].values())

    def lost(self, e: Exception) -> DistributedError:
        """The error of a failed step; if a rank is lost, the heartbeat reports that first and ends this process."""
        rank = self.group.rank()
        if not isinstance(e, OSError) and not _is_of_backend(e):
            words = " ".join(str(e).split())[:300]
            return DistributedError(f"rank {rank} failed within a step ({type(e).__name__}: {words}); start all again.")
        time.sleep(LOST_S)
        return LostError(f"rank {rank} has lost another ({e}); start all again.")


@contextmanager
def joined(mode: str) -> Iterator[Rank | None]:
    """This process's rank while a command runs, or None if it is alone.

    Raises DistributedError if a mode is given and this process is alone, or the others cannot be reached.
    """
    if not groups.is_launched():
        if mode != AUTO:
            raise DistributedError(f"--distributed {mode} needs several processes; start them with `ring-mlx launch`.")
        yield None
        return
    launcher = heartbeat.of_launcher()
    if launcher is not None:
        launcher.all_started.wait()  # MLX looks for the others with pauses that grow
    group = groups.join(groups.JOIN_S if launcher is None else groups.JOIN_TOGETHER_S)
    if launcher is not None:
        launcher.joined()
    rank = Rank(group, mode, heartbeat.RankHeartbeat(group.rank(), *connect(group)))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank.is_first else nowhere):
            yield rank
    except BaseException as e:
        # A backend that has lost a peer says so at once; the heartbeat knows which, and ends this process.
        lost = rank.lost(e) if isinstance(e, RuntimeError) and _is_of_backend(e) else e
        rank.heartbeat.fail()
        if isinstance(lost, LostError):
            print(f"ring-mlx: {lost}", file=sys.stderr)
            raise SystemExit(LOST) from None
        raise
    rank.heartbeat.close()


def _is_of_backend(e: Exception) -> bool:
    return isinstance(e, RuntimeError) and str(e).startswith("[")
