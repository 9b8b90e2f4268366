"""A process that saves snapshots until it is killed; their content follows from their tokens, so it can be checked."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from ring_mlx.engine.snapshots import BLOCK_TOKENS, Block, Snapshot, Store

HEAD_DIM = 32


def make(seed, length, blocks=()):
    """A snapshot of a made-up model after ``length`` tokens; full blocks may come from an earlier one."""
    sequence = np.random.default_rng(seed).integers(0, 99, length, dtype=np.int32)
    full = length // BLOCK_TOKENS
    parts = [*blocks[:full]]
    parts += [block(sequence, n * BLOCK_TOKENS, (n + 1) * BLOCK_TOKENS) for n in range(len(parts), full)]
    tail = block(sequence, full * BLOCK_TOKENS, length) if length % BLOCK_TOKENS else None
    states = [mx.full((1, 2, 3, 4), float(sequence.sum())), mx.full((1, 2, 3, 4), float(length))]
    return Snapshot(sequence, states, parts, tail, (None,), kind="test")


def block(sequence, start, end):
    """Keys and values that say which tokens they stand for."""
    values = mx.array(sequence[start:end].astype(np.float32))[None, None, :, None]
    return Block(sequence[start:end], [mx.broadcast_to(values + n, (1, 1, end - start, HEAD_DIM)) for n in range(2)])


def check(snapshot, tolerance=0.0):
    """Whether a snapshot is what `make` would make of its tokens, number by number."""
    for n in range(2):
        held = np.array(mx.concatenate([p.arrays[n] for p in snapshot.parts], axis=2))[0, 0]
        if np.abs(held - (snapshot.tokens[:, None] + n)).max() > tolerance:
            return False
    states = [np.unique(np.array(s)).tolist() for s in snapshot.states]
    return states == [[float(snapshot.tokens.sum())], [float(snapshot.offset)]]


def save_for_ever(folder, seed, budget_bytes, saved, last_step=None):
    """Save longer and longer snapshots of many sequences, and tell ``saved`` of each.

    With ``last_step`` the process is killed before that operation on a file of the folder.
    """
    mx.set_default_device(mx.cpu)
    if last_step is not None:
        sys.addaudithook(_killer(str(folder), last_step))
    store = Store(Path(folder), "mark", budget_bytes)
    for n in itertools.count():
        made = make(seed + n, 300)
        store.save([made])
        store.save([make(seed + n, 700, made.blocks)])
        saved.release()


def _killer(folder, last_step):
    left = itertools.count(last_step - 1, -1)

    def before(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def save_some(folder, seed, budget_bytes, count):
    """Save ``count`` snapshots and read some of them back."""
    mx.set_default_device(mx.cpu)
    store = Store(Path(folder), "mark", budget_bytes)
    for n in range(count):
        made = make(seed + n, 300 + n)
        store.save([made])
        found = store.deepest(np.append(made.tokens, 0))
        assert found is None or check(found)
