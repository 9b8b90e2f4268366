"""A tree of token prefixes that finds the deepest snapshot of a prompt, within a budget."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from ring_mlx.engine.snapshots.blocks import Block, Snapshot, Tokens

END, INNER, PLACE, FIRST = range(4)
RANKS = {"prompt": END, "generated": END, "system": PLACE}
NEWEST_KINDS = ("user", "answer")
PLACE_AGES = 16


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


class _Node:
    """A run of tokens, and the snapshot after its last one if there is one."""

    def __init__(self, edge: Tokens, parent: _Node | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.rank, self.used = INNER, 0


class SnapshotTree:
    """Snapshots by prefix, compressed: a run of tokens without a branch or a snapshot is one node.

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
        self._root = _Node(np.zeros(0, dtype=np.int32), None)
        self._nodes: dict[Snapshot, _Node] = {}
        self._shared: Counter[Block] = Counter()
        self._nbytes = 0
        self._prompts = 0
        self._ranks: tuple[OrderedDict[Snapshot, _Node], ...] = tuple(OrderedDict() for _ in range(FIRST + 1))
        self._held: WeakKeyDictionary[object, Snapshot] = WeakKeyDictionary()
        self._latest: Snapshot | None = None
        self.told_short = False
        self.save_first: Callable[[Snapshot], bool] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._nodes))

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
        return [n.snapshot for n in self._walk(np.asarray(tokens, dtype=np.int32)) if n.snapshot is not None]

    def deepest(self, tokens: Sequence[int] | Tokens) -> Snapshot | None:
        """The longest snapshot that is a prefix of ``tokens`` and gives, or leads to, the logits of the next token."""
        usable = [s for s in self.path(tokens) if s.offset < len(tokens) or s.logits is not None]
        if not usable:
            return None
        self._place(usable[-1], self._nodes[usable[-1]].rank)
        return usable[-1]

    def add(self, snapshot: Snapshot, holder: object = None, rank: int | None = None) -> Snapshot:
        """Keep a snapshot; where there is one of the same tokens, that one stays and learns the logits.

        Args:
            snapshot: What to keep.
            holder: Whose prompt has got to it, as for `hold`.
            rank: Of its use, by default as its kind says.

        Returns:
            The one that the tree holds, or held if there is no room for it.
        """
        node = self._node_at(snapshot.tokens)
        if node.snapshot is None:
            node.snapshot, self._nodes[snapshot] = snapshot, node
            self._account(snapshot, 1)
        else:
            self._account(node.snapshot, -1)
            node.snapshot.learn(snapshot)
            self._account(node.snapshot, 1)
            rank = node.rank if rank is None else max(rank, node.rank)
        kept = node.snapshot
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
            self._drop(self._nodes[least])

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
            elif (rank := FIRST if 2 * s.offset >= path[-1].offset else PLACE) != self._nodes[s].rank:
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
        age_of_place, age_of_first = (self._prompts - self._nodes[s].used for s in (place, first))
        return place if PLACE_AGES * (age_of_place + 1) >= age_of_first else first

    def remove(self, snapshot: Snapshot) -> None:
        """Drop a snapshot."""
        if snapshot in self._nodes:
            self._drop(self._nodes[snapshot])

    def _walk(self, ids: Tokens) -> Iterator[_Node]:
        node, at = self._root, 0
        yield node
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            n = len(child.edge)
            if common_prefix(child.edge, ids[at:]) < n:
                return
            node, at = child, at + n
            yield node

    def _node_at(self, ids: Tokens) -> _Node:
        *_, node = self._walk(ids)
        at = _depth(node)
        if at == len(ids):
            return node
        child = node.children.get(int(ids[at]))
        if child is None:
            return _attach(node, ids[at:])
        n = common_prefix(child.edge, ids[at:])
        middle = _attach(node, child.edge[:n])
        child.edge, child.parent = child.edge[n:], middle
        middle.children[int(child.edge[0])] = child
        return middle if at + n == len(ids) else _attach(middle, ids[at + n :])

    def _drop(self, node: _Node) -> None:
        self._forget(node)
        while node.parent is not None and node.snapshot is None and not node.children:
            del node.parent.children[int(node.edge[0])]
            node = node.parent
        if node.parent is not None and node.snapshot is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
            node.parent.children[int(child.edge[0])] = child

    def _forget(self, node: _Node) -> None:
        snapshot, node.snapshot = node.snapshot, None
        assert snapshot is not None
        if snapshot is self._latest:
            self._latest = None
        del self._nodes[snapshot], self._ranks[node.rank][snapshot]
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
        node = self._nodes[snapshot]
        self._ranks[node.rank].pop(snapshot, None)
        node.rank, node.used = rank, self._prompts
        self._ranks[rank][snapshot] = node


def _attach(parent: _Node, edge: Tokens) -> _Node:
    node = _Node(edge, parent)
    parent.children[int(edge[0])] = node
    return node


def _depth(node: _Node) -> int:
    depth = 0
    at: _Node | None = node
    while at is not None:
        depth += len(at.edge)
        at = at.parent
    return depth
