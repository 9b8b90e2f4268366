"""Snapshots in memory by the tokens before them: finds the deepest one of a prompt, within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from ring_mlx.engine.snapshots.blocks import Block, Key, Snapshot, Tokens, keys_of

END, INNER, PLACE, FIRST = range(4)
RANKS = {"prompt": END, "generated": END, "system": PLACE}
NEWEST_KINDS = ("user", "answer")
PLACE_AGES = 16


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


@dataclass
class _Use:
    """The rank of a snapshot, and how many prompts there had been when it was used last."""

    rank: int = INNER
    at: int = 0


class SnapshotTree:
    """Snapshots by the prefix that they have read.

    Over the budget, the least useful snapshots for likely next prompts are dropped first. The likeliest next prompt of a conversation
    goes on from its first place, the deepest that its next turn shares; a new chat goes on from a start that many
    share. Less likely is another answer or another last question, from the other newest places; an edit further back
    is rarer still, and the ends of prompts and answers save a few tokens only. So there are four ranks, in each of
    which what was used longest ago goes first: such ends, then inner places, then newest and first places by their age
    in prompts, where a newest place counts as `PLACE_AGES` times as old. A start counts as a first place while it is
    half of its conversation or more, and is used only where a chat begins. What a prompt in flight has got to and the
    first place of the latest conversation stay, over the budget if need be: to read a long text again costs more than
    its keys and values take.

    Args:
        budget_bytes: Most bytes that snapshots may take; 0 keeps none.
        most: At most so many of them, as far as those in use go; None is any number.

    Attributes:
        save_first: Saves a snapshot that is dropped before it was saved, and is not called again once it returns False;
            None where there is no disk.
    """

    def __init__(self, budget_bytes: int, most: int | None = None) -> None:
        self.budget_bytes, self._most = budget_bytes, most
        self._squeezed: int | None = None
        self._by_key: dict[Key, Snapshot] = {}
        self._uses: dict[Snapshot, _Use] = {}
        self._shared: Counter[Block] = Counter()
        self._nbytes = 0
        self._prompts = 0
        self._ranks: list[dict[Snapshot, None]] = [{} for _ in range(FIRST + 1)]  # the one used longest ago first
        self._held: WeakKeyDictionary[object, Snapshot] = WeakKeyDictionary()
        self._latest: Snapshot | None = None
        self.told_short = False
        self.save_first: Callable[[Snapshot], bool] | None = None

    def __len__(self) -> int:
        return len(self._uses)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._uses))

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots, with each shared block counted once."""
        return self._nbytes

    @property
    def latest(self) -> Snapshot | None:
        """The first place of the conversation that settled last."""
        return self._latest

    def path(self, tokens: Sequence[int] | Tokens) -> list[Snapshot]:
        """Every snapshot that is a prefix of ``tokens``, the shortest first."""
        ids = np.asarray(tokens, dtype=np.int32)
        return [self._by_key[key] for key in keys_of(ids, {at for at, _ in self._by_key}) if key in self._by_key]

    def deepest(self, tokens: Sequence[int] | Tokens) -> Snapshot | None:
        """The longest snapshot that is a prefix of ``tokens`` and gives, or leads to, the logits of the next token."""
        usable = [s for s in self.path(tokens) if s.offset < len(tokens) or s.logits is not None]
        if not usable:
            return None
        self._place(usable[-1], self._uses[usable[-1]].rank)
        return usable[-1]

    def add(self, snapshot: Snapshot, holder: object = None, rank: int | None = None) -> Snapshot:
        """Keep a snapshot; where there is one of the same tokens, that one stays and learns the logits.

        ``holder`` is as for `hold`, ``rank`` by default as its kind says. Returns the one that the tree holds, or held
        if there is no room for it.
        """
        kept = self._by_key.setdefault(snapshot.key, snapshot)
        if kept is snapshot:
            self._uses[kept] = _Use()
        else:
            self._account(kept, -1)
            kept.learn(snapshot)
            rank = self._uses[kept].rank if rank is None else max(rank, self._uses[kept].rank)
        self._account(kept, 1)
        self._place(kept, RANKS.get(kept.kind, INNER) if rank is None else rank)
        if holder is not None:
            self.hold(holder, kept)
        self.evict()
        return kept

    def hold(self, holder: object, snapshot: Snapshot) -> None:
        """Keep the snapshot that a prompt has reached, whatever the budget, until it settles or ``holder`` is gone.

        Its conversation goes on from there, and no longer from what was held for it before.
        """
        if self._held.get(holder) is self._latest:
            self._latest = snapshot
        self._held[holder] = snapshot
        self._go_on_from(self.path(snapshot.tokens))

    def held(self, holder: object) -> Snapshot | None:
        """What is kept for a prompt in flight."""
        return self._held.get(holder)

    def settle(self, tokens: Sequence[int] | Tokens, holder: object = None) -> None:
        """End a prompt, whose conversation goes on with ``tokens`` as far as that is known, and keep the budget."""
        self._prompts += 1
        if holder is not None:
            self._held.pop(holder, None)
        path = self.path(tokens)
        self._go_on_from(path)
        self._latest = path[-1] if path else None
        self.evict()

    def evict(self) -> None:
        """Drop snapshots until the rest fits the budget, or only what must stay is left.

        What is worth a place on disk and not there yet is saved first: else it would be read again.
        """
        while not self._holds(self._nbytes, len(self)) and (least := self._least()) is not None:
            if least.durable and not least.saved and self.save_first is not None and not self.save_first(least):
                self.save_first = None
            self._drop(least)

    def squeeze(self, most_bytes: int | None) -> None:
        """Hold at most so many bytes for now, below the budget; None lifts that.

        At 0 the first place of the latest conversation goes too, and only what prompts in flight have got to stays.
        """
        self._squeezed = most_bytes
        self.evict()

    def _holds(self, nbytes: int, count: int) -> bool:
        most = self.budget_bytes if self._squeezed is None else min(self._squeezed, self.budget_bytes)
        return nbytes <= most and (self._most is None or count <= self._most)

    def _go_on_from(self, path: Sequence[Snapshot]) -> None:
        """Give ranks to a conversation's snapshots, of which the last is its first place now."""
        newest = {s.kind: s for s in path[:-1] if s.kind in NEWEST_KINDS}
        for s in path[:-1]:
            if s.kind != "system":
                self._place(s, PLACE if newest.get(s.kind) is s else END if s.kind == "generated" else INNER)
            elif (rank := FIRST if 2 * s.offset >= path[-1].offset else PLACE) != self._uses[s].rank:
                self._place(s, rank)
        for s in path[-1:]:
            self._place(s, FIRST)

    def _least(self) -> Snapshot | None:
        """What the next prompts miss least; None if all must stay."""
        stay: set[Snapshot | None] = set(self._held.values()) if self.budget_bytes else set()
        if self.budget_bytes and self._squeezed != 0:
            stay.add(self._latest)
        end, inner, place, first = (next((s for s in rank if s not in stay), None) for rank in self._ranks)
        if end or inner or not (place and first):
            return end or inner or place or first
        age_of_place, age_of_first = (self._prompts - self._uses[s].at for s in (place, first))
        return place if PLACE_AGES * (age_of_place + 1) >= age_of_first else first

    def remove(self, snapshot: Snapshot) -> None:
        if snapshot in self._uses:
            self._drop(snapshot)

    def _drop(self, snapshot: Snapshot) -> None:
        if snapshot is self._latest:
            self._latest = None
        del self._by_key[snapshot.key], self._ranks[self._uses.pop(snapshot).rank][snapshot]
        self._account(snapshot, -1)

    def _account(self, snapshot: Snapshot, sign: int) -> None:
        self._nbytes += sign * snapshot.own_bytes
        for block in snapshot.blocks:
            if sign > 0:
                self._shared[block] += 1
                if self._shared[block] == 1:
                    self._nbytes += block.nbytes
            else:
                self._shared[block] -= 1
                if self._shared[block] == 0:
                    del self._shared[block]
                    self._nbytes -= block.nbytes

    def _place(self, snapshot: Snapshot, rank: int) -> None:
        """Note a use: the snapshot is the one of its rank that was used last."""
        use = self._uses[snapshot]
        self._ranks[use.rank].pop(snapshot, None)
        use.rank, use.at = rank, self._prompts
        self._ranks[rank][snapshot] = None
