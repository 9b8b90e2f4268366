"""Time to save and resume a long conversation at the true sizes of a model: ``python -m benchmarks.store_speed``.

The arrays are made up, so no model is needed: bfloat16 keys and values of the softmax layers and float32 states.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ring_mlx.bench.shapes import SHAPES
from ring_mlx.engine.snapshots import BLOCK_TOKENS, Block, Snapshot, Store
from ring_mlx.model.config import RingConfig


def make(config: RingConfig, tokens: np.ndarray, blocks: list[Block]) -> Snapshot:
    """A snapshot of the given length whose first blocks are shared."""
    linear = sum(config.is_linear(i) for i in range(config.num_hidden_layers))
    softmax = config.num_hidden_layers - linear
    kv, state = (1, config.num_key_value_heads, BLOCK_TOKENS, config.head_dim), config.head_dim
    parts = list(blocks)
    for at in range(len(parts) * BLOCK_TOKENS, len(tokens), BLOCK_TOKENS):
        arrays = [mx.random.normal(kv).astype(mx.bfloat16) for _ in range(2 * softmax)]
        parts.append(Block(tokens[at : at + BLOCK_TOKENS], arrays))
    states: list[mx.array | None] = [
        mx.random.normal((1, config.num_attention_heads, state, state)) for _ in range(linear)
    ]
    mx.eval([p.arrays for p in parts], states)
    return Snapshot(tokens, states, parts, None, (None,) * softmax)


def timed(label: str, work: object) -> object:
    """Run and print."""
    started = time.perf_counter()
    result = work()  # type: ignore[operator]
    print(f"{label:44} {time.perf_counter() - started:6.2f} s")
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="of keys and values on disk")
    args = parser.parse_args()
    config = RingConfig.from_dict(SHAPES[args.shape])
    tokens = np.random.default_rng(0).integers(0, 1000, args.tokens + BLOCK_TOKENS, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), "model", 1 << 40, args.kv_bits)
        first = make(config, tokens[: args.tokens], [])
        timed(f"save {args.tokens} tokens", lambda: store.save([first]))
        more = make(config, tokens, first.blocks)
        timed(f"save {BLOCK_TOKENS} tokens more", lambda: store.save([more]))
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        other = Store(Path(folder), "model", 1 << 40)
        found = timed("resume (read, verify, load)", lambda: other.deepest(np.append(tokens, 0)))
        assert isinstance(found, Snapshot)
        assert found.offset == len(tokens)
        print(f"{size / 1e6:.0f} MB on disk in {sum(len(f) for _, _, f in os.walk(folder))} files")


if __name__ == "__main__":
    main()
