"""The model's state after prefixes of tokens: kept in memory, shared in blocks, stored on disk.

``blocks`` holds the values, ``live`` the one sequence that grows, ``tree`` finds the deepest snapshot of a prompt
within a budget, ``store`` is the same on disk. Nothing here knows text, templates or sampling.
"""

from ring_mlx.engine.snapshots.blocks import Block, Snapshot
from ring_mlx.engine.snapshots.live import Live
from ring_mlx.engine.snapshots.store import Store
from ring_mlx.engine.snapshots.tree import SnapshotTree, common_prefix
from ring_mlx.engine.stored.manifest import BLOCK_TOKENS

__all__ = ["BLOCK_TOKENS", "Block", "Live", "Snapshot", "SnapshotTree", "Store", "common_prefix"]
