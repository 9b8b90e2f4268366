"""Compares what must be equal on every rank; needs no MLX."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import ring_mlx
from ring_mlx.distributed.failure import DistributedError


def versions() -> dict[str, str]:
    """Versions that must be the same everywhere."""
    return {"ring-mlx": ring_mlx.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


def compare(records: list[dict[str, Any]]) -> None:
    """Raises DistributedError where a record with ``host``, ``versions`` and ``weights`` differs from the first."""
    first = records[0]
    for rank, r in enumerate(records):
        for name, wanted in first["versions"].items():
            seen = r["versions"].get(name)
            if seen != wanted:
                raise DistributedError(
                    f"rank {rank} ({r['host']}) has {name} {seen}, rank 0 ({first['host']}) {wanted}; install the same."
                )
        if r["weights"] != first["weights"]:
            raise DistributedError(
                f"rank {rank} ({r['host']}) has other weights than rank 0 ({first['host']}): fingerprints "
                f"{r['weights'][:8]} and {first['weights'][:8]}; copy the same checkpoint to both."
            )
