"""Identifies a model by what it computes, so that snapshots of another one are not taken for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from ring_mlx.checkpoint.safetensors_header import read_header
from ring_mlx.checkpoint.weights import EXPERT_DIGESTS
from ring_mlx.model.config import RingConfig

SAMPLE_BYTES = 4096


def fingerprint(config: RingConfig, shards: Iterable[Path], dtype: mx.Dtype, exact: bool) -> str:
    """A short name for what the model computes: configuration, precision, headers, and samples of every tensor.

    A finetune may leave a file's size, ends and most of its tensors as they were, so up to 16 places of 4 KiB are read
    of each tensor, evenly spread. A file whose header holds checksums of its data is identified by those.
    """
    # The default is left out, so that what older versions kept is found again.
    keys = {k: v for k, v in asdict(config).items() if (k, v) != ("decay_layer_offset", 0)}
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode())
    digest.update(f"{dtype}{exact}".encode())
    for shard in shards:
        header = read_header(shard)
        digest.update(header.raw)
        if EXPERT_DIGESTS in header.metadata:
            continue
        with shard.open("rb") as f:
            for _, tensor in sorted(header.tensors.items()):
                for at in _places(tensor.start, tensor.end):
                    f.seek(len(header.raw) + at)
                    digest.update(f.read(min(SAMPLE_BYTES, tensor.end - at)))
    return digest.hexdigest()[:32]


def _places(start: int, end: int) -> list[int]:
    """Where to sample bytes ``start`` to ``end``: one place for every MiB, at most 16, the last one at the end."""
    last = max(start, end - SAMPLE_BYTES)
    count = min(16, 1 + (end - start) // (1 << 20))
    return sorted({start + (last - start) * i // count for i in range(count + 1)})
