"""Rank 0 of a server: readers, a batch and snapshots whose steps are also sent to the other ranks.

Requests, their text and every decision stay on rank 0; `ring_mlx.distributed.follower` does the same steps to the same
tokens elsewhere. The orders, each with what needs not be kept any more:

    start    reader N goes to snapshot S, or to nothing
    read     reader N reads a prompt, its first step; whether it stops after a step follows where that is asked
    next     reader N, one step more
    add      the batch takes reader N's cache, and the tokens that continue it
    step     the batch, one step; rank 0's tokens go to all by way of the group
    remove   row R leaves the batch
    close    the end

Readers, rows and snapshots are counted alike on all ranks, and are known by their number.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ring_mlx.distributed.group import exchange, of_first
from ring_mlx.engine.loaded import LoadedModel
from ring_mlx.engine.model_thread import ModelLostError
from ring_mlx.engine.reading import PromptReader
from ring_mlx.engine.snapshots import Snapshot, SnapshotTree, Store
from ring_mlx.generation.batch import Batch
from ring_mlx.model.cache import HybridCache

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ring_mlx.distributed.group import Channel
    from ring_mlx.distributed.rank import Rank
    from ring_mlx.engine.events import SessionOptions
    from ring_mlx.model.model import Model

READER, SNAPSHOT = "reader", "snapshot"


class Leader(LoadedModel):
    """A rank's part of a model, whose readers and batch send their steps to the other ranks."""

    can_tell_prompts = False

    def __init__(
        self, model: Model, tokenizer: TokenizerWrapper, options: SessionOptions, rank: Rank, channel: Channel
    ) -> None:
        super().__init__(model, tokenizer, options)
        self.check_plain("`ring-mlx launch`")
        self.group, self._rank, self._channel = rank.group, rank, channel
        self._count, self._readers = itertools.count(), weakref.WeakValueDictionary[int, _Reader]()
        self._budget_bytes = common_budget(super().budget_bytes(), model, self.group)
        self.gone: deque[tuple[str, int]] = deque()

    def budget_bytes(self) -> int:
        """Snapshot budget that fits every rank."""
        return self._budget_bytes

    @property
    def drafts(self) -> None:
        """None: the ranks read one token of each row at a time."""

    def tree(self) -> SnapshotTree:
        """Snapshots that report when they are dropped."""
        return _Tree(self)

    def store(self) -> Store | None:
        """None: a rank has only a part of a snapshot, and disks may differ."""
        return None

    def reader(self, tree: SnapshotTree, store: Store | None, step_tokens: int | None = None) -> PromptReader:
        number = next(self._count)
        assert isinstance(tree, _Tree)
        reader = self._readers[number] = _Reader(number, self, tree)
        weakref.finalize(reader, self.gone.append, (READER, number)).atexit = False
        return reader

    def batch(self) -> Batch:
        return _Batch(self)

    def number_of(self, cache: HybridCache | None) -> int:
        """The number of the reader with this cache."""
        return next(n for n, reader in self._readers.items() if reader.live.cache is cache)

    def tell(self, do: str, **details: Any) -> None:
        """Send an order, with the snapshots dropped since the last."""
        gone = [self.gone.popleft() for _ in range(len(self.gone))]
        with self.in_step():
            self._channel.send({"do": do, "gone": gone, **details})

    def same(self, answer: bool) -> bool:
        """A value on which all ranks agree."""
        with self.in_step():
            self._channel.send(answer)
        return answer

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Work that must not fail on one rank alone. Raises ModelLostError if it does."""
        try:
            yield
        except Exception as e:
            raise ModelLostError(self._rank.lost(e)) from e


def common_budget(own_bytes: int, model: Model, group: mx.distributed.Group) -> int:
    """This rank's budget of snapshots, as the rank with the least room for each of its layers allows."""
    layers = len(model.layers)
    records = exchange(group, {"bytes": own_bytes, "layers": layers})
    return min(int(r["bytes"]) * layers // int(r["layers"]) for r in records)


class _Tree(SnapshotTree):
    """Numbers added snapshots, kept or not, and reports dropped ones."""

    def __init__(self, leader: Leader) -> None:
        super().__init__(leader.budget_bytes(), leader.options.max_snapshots)
        self._gone, self._count = leader.gone, itertools.count()
        self._numbers: dict[Snapshot, int] = {}

    def number(self, snapshot: Snapshot | None) -> int | None:
        return None if snapshot is None else self._numbers[snapshot]

    def add(self, snapshot: Snapshot, holder: object = None, rank: int | None = None) -> Snapshot:
        self._numbers[snapshot] = next(self._count)
        kept = super().add(snapshot, holder, rank)
        if kept is not snapshot:
            self._drop_number(snapshot)
        return kept

    def _drop(self, snapshot: Snapshot) -> None:
        self._drop_number(snapshot)
        super()._drop(snapshot)

    def _drop_number(self, snapshot: Snapshot) -> None:
        self._gone.append((SNAPSHOT, self._numbers.pop(snapshot)))


class _Reader(PromptReader):
    def __init__(self, number: int, leader: Leader, tree: _Tree) -> None:
        self._number, self._leader, self._numbers = number, leader, tree.number
        super().__init__(leader.model, tree, step_tokens=leader.options.prefill_step_tokens)

    def start(self, ids: Sequence[int]) -> int:
        self._leader.tell("start", reader=self._number, snapshot=self._numbers(self.tree.deepest(ids)))
        return super().start(ids)

    def read(
        self,
        ids: Sequence[int],
        points: Mapping[int, str],
        stopped: Callable[[], bool],
        step_tokens: int | None = None,
        look: Callable[[mx.array], None] | None = None,
    ) -> Iterator[int]:
        leader, number = self._leader, self._number
        steps = super().read(ids, points, lambda: leader.same(stopped()), step_tokens, look)
        what = {"ids": [int(i) for i in ids], "points": list(points.items()), "step_tokens": step_tokens}
        leader.tell("read", reader=number, **what)
        while True:
            with leader.in_step():
                known = next(steps, None)
            if known is None:
                return
            yield known
            leader.tell("next", reader=number)

    def forget(self) -> None:
        self._leader.tell("start", reader=self._number, snapshot=None)
        super().forget()


class SharedBatch(Batch):
    """A batch in parts on every rank; rank 0 chooses its tokens."""

    def __init__(self, model: Model, prefill_step_size: int | None, group: mx.distributed.Group) -> None:
        super().__init__(model, prefill_step_size)
        self._group = group

    def _choose_all(self) -> mx.array:
        chosen = of_first(super()._choose_all(), self._group)
        mx.async_eval(chosen)  # a rank of a pipeline waits within the model's call for what follows from it
        return chosen


class _Batch(SharedBatch):
    def __init__(self, leader: Leader) -> None:
        super().__init__(leader.model, leader.options.prefill_step_tokens, leader.group)
        self._leader = leader

    def add(self, prompt: Sequence[int], *, cache: HybridCache | None = None, **options: Any) -> int:
        number = super().add(prompt, cache=cache, **options)
        details = {"prompt": [int(i) for i in prompt], "max_tokens": options.get("max_tokens")}
        self._leader.tell("add", reader=self._leader.number_of(cache), **details)
        return number

    def step(self) -> dict[int, int]:
        self._leader.tell("step")
        with self._leader.in_step():
            return super().step()

    def remove(self, number: int) -> HybridCache:
        self._leader.tell("remove", row=number)
        with self._leader.in_step():
            return super().remove(number)
