"""Time to save and resume a long conversation at the true sizes of a model: ``python -m benchmarks.store_speed``.

The arrays are made up, so no model is needed: bfloat16 keys and values of the softmax layers and float32 states.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.common import arguments, report
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


def rows(args: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Saved, saved on, and resumed."""
    config = RingConfig.from_dict(SHAPES[args.shape])
    tokens = np.random.default_rng(0).integers(0, 1000, args.tokens + BLOCK_TOKENS, dtype=np.int32)
    store = Store(Path(folder), "model", 1 << 40, args.kv_bits)
    first = make(config, tokens[: args.tokens], [])
    more = make(config, tokens, first.blocks)
    other = Store(Path(folder), "model", 1 << 40)
    work: dict[str, Callable[[], object]] = {
        f"save {args.tokens} tokens": lambda: store.save([first]),
        f"save {BLOCK_TOKENS} tokens more": lambda: store.save([more]),
        "resume (read, verify, load)": lambda: other.deepest(np.append(tokens, 0)),
    }
    for label, call in work.items():
        started = time.perf_counter()
        found = call()
        files = [f for f in Path(folder).rglob("*") if f.is_file()]
        row = {"work": label, "s": time.perf_counter() - started}
        yield row | {"MB on disk": sum(f.stat().st_size for f in files) / 1e6, "files": len(files)}
    assert isinstance(found, Snapshot)
    assert found.offset == len(tokens)


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--tokens", type=int, default=32768, help="in whole blocks (32768)")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="of keys and values on disk")
    args = parser.parse_args()
    args.bits = 16
    with tempfile.TemporaryDirectory() as folder:
        report(args, rows(args, folder))


if __name__ == "__main__":
    main()
