"""A tree of token prefixes that finds the deepest snapshot of a prompt, within a budget; knows no model and no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ring_mlx.snapshots.blocks import Block, Snapshot, Tokens


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
        self.used = 0


class SnapshotTree:
    """Snapshots by prefix, compressed: a run of tokens without a branch or a snapshot is one node.

    Over the budget, what was used longest ago goes first: leaves off the last prompt's path, then any other. What is
    pinned stays, over the budget if need be: a long text's keys and values may exceed it, and to read that text again
    would cost more.

    Args:
        budget_bytes: Most bytes that snapshots may take; 0 keeps none.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._root = _Node(np.zeros(0, dtype=np.int32), None)
        self._nodes: dict[Snapshot, _Node] = {}
        self._shared: Counter[Block] = Counter()
        self._nbytes = 0
        self._clock = 0
        self._path: set[_Node] = set()
        self._pinned: set[Snapshot] = set()

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._nodes))

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots, with each shared block counted once."""
        return self._nbytes

    def deepest(self, tokens: Sequence[int] | Tokens) -> Snapshot | None:
        """The longest snapshot that is a prefix of ``tokens`` and leaves something to say about the next token."""
        ids, best = np.asarray(tokens, dtype=np.int32), None
        for node in self._walk(ids):
            s = node.snapshot
            if s is not None and (s.offset < len(ids) or s.logits is not None):
                best = node
        if best is None:
            return None
        self._touch(best)
        return best.snapshot

    def add(self, snapshot: Snapshot) -> Snapshot:
        """Keep a snapshot; where there is one of the same tokens, the one that knows logits stays.

        Returns:
            The one that the tree holds.
        """
        node = self._node_at(snapshot.tokens)
        old = node.snapshot
        if old is None or (old.logits is None and snapshot.logits is not None):
            if old is not None:
                snapshot.durable, snapshot.saved = old.durable or snapshot.durable, old.saved
                self._forget(node)
            node.snapshot = snapshot
            self._nodes[snapshot] = node
            self._account(snapshot, 1)
        elif snapshot.durable:
            old.durable = True
        self._touch(node)
        kept = node.snapshot
        assert kept is not None
        self.evict()
        return kept

    def pin(self, snapshot: Snapshot) -> None:
        """Keep a snapshot whatever the budget says, until `settle`."""
        self._pinned.add(snapshot)

    def settle(self, tokens: Sequence[int] | Tokens, first: Snapshot | None = None) -> None:
        """End a prompt: unpin what it used, mark its path as used, and keep within the budget.

        Later turns outlive earlier ones, the start of the conversation outlives both, and ``first``, from which the
        next prompt is likeliest to go on, is pinned until the next prompt has ended.
        """
        self._pinned.clear()
        path = [n for n in self._walk(np.asarray(tokens, dtype=np.int32)) if n.snapshot is not None]
        self._path = set(path)
        for node in [*path, *path[:1]]:
            self._touch(node)
        if first is not None and first in self._nodes:
            self._touch(self._nodes[first])
            self._pinned.add(first)
        self.evict()

    def evict(self) -> None:
        """Drop snapshots until the rest fits the budget, or all that are left are pinned."""
        while self._nbytes > self.budget_bytes:
            free = [n for n in self._nodes.values() if n.snapshot not in self._pinned or not self.budget_bytes]
            if not free:
                return
            self._drop(min(free, key=lambda n: (bool(n.children) or n in self._path, n.used)))

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
        del self._nodes[snapshot]
        self._pinned.discard(snapshot)
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

    def _touch(self, node: Any) -> None:
        self._clock += 1
        node.used = self._clock


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
