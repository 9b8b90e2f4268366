"""What a fork does with a tampered store of snapshots or prompt cache; fails if it believes what cannot be."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from ring_mlx.cli import main
from ring_mlx.engine.snapshots import Block, Snapshot, Store
from ring_mlx.engine.stored.stores import free_disk
from ring_mlx.errors import CacheFileError
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.cache_shapes import Shapes

SHAPES = Shapes((True, False, False), 2, 1, 32, 99, mx.float32, 4096)
LENGTHS = (20, 300)


def make(seed: int, length: int) -> Snapshot:
    """A snapshot whose numbers follow from its tokens."""
    tokens = np.random.default_rng(seed).integers(0, 99, length, dtype=np.int32)
    parts = [_block(tokens[at : at + 256]) for at in range(0, length, 256)]
    full = length // 256
    state = mx.full((1, 2, 32, 32), float(tokens.sum()))
    tail = parts[full] if length % 256 else None
    return Snapshot(tokens, [state], parts[:full], tail, (None, None), mx.full((1, 99), 1.0), "test")


def use_store(root: str, is_forged: bool) -> None:
    """Look for snapshots, save others, list and prune; what is found is right, or fits the model if it was forged."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store = Store(Path(root), "mark", 1 << 40, shapes=SHAPES)
        for _ in range(2):
            for n, length in enumerate(LENGTHS):
                made = make(n, length)
                found = store.deepest(np.append(made.tokens, 98))
                assert found is None or found.offset in LENGTHS
                if found is not None:
                    found.check(SHAPES)
                    mx.eval(_arrays(found))
                    assert is_forged or _equal(found, make(LENGTHS.index(found.offset), found.offset))
        assert len(told) <= 1, [str(w.message) for w in told]
        other = make(7, 40)
        with suppress(CacheFileError):
            store.save([other])
            found = store.deepest(np.append(other.tokens, 98))
            assert found is not None
            assert _equal(found, other)
        free_disk(1, root, root)
    for command in (["info"], ["list"], ["list", "--json"], ["prune", "--max-size", "1MB"], ["prune", "--all"]):
        assert main(["cache", *command, "--cache-dir", root]) in (0, 2)


def load_cache(path: str) -> None:
    """Load a prompt cache; what is accepted fits the model."""
    cache, tokens, _ = HybridCache.load(path, "mark", SHAPES)
    assert [type(c).__name__ for c in cache] == ["ArraysCache", "KVCache", "KVCache"]
    assert all(c.offset == len(tokens) for c in cache[1:])
    for c in cache[1:]:
        assert not tokens or c.keys.shape == c.values.shape == (1, 1, len(tokens), 32)
    mx.eval([a for a in cache.state if a is not None])


def _block(tokens: np.ndarray) -> Block:
    values = mx.array(tokens.astype(np.float32))[None, None, :, None]
    return Block(tokens, [mx.broadcast_to(values + n, (1, 1, len(tokens), 32)) for n in range(4)])


def _arrays(s: Snapshot) -> list[mx.array]:
    found = [*s.states, s.logits, *(a for part in s.parts for a in part.arrays)]
    return [a for a in found if a is not None]


def _equal(a: Snapshot, b: Snapshot) -> bool:
    return np.array_equal(a.tokens, b.tokens) and all(
        mx.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True)
    )
