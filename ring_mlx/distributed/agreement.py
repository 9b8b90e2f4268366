"""Compares what must be equal on every rank, and names the rank that differs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import ring_mlx
from ring_mlx.distributed.failure import DistributedError


def versions() -> dict[str, str]:
    """Of what must be the same everywhere."""
    return {"ring-mlx": ring_mlx.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


def difference(records: list[dict[str, Any]]) -> str | None:
    """In one line, in what a record with ``host``, ``versions`` and ``weights`` differs from the first; or None."""
    first = records[0]
    for rank, r in enumerate(records):
        for name, wanted in first["versions"].items():
            seen = r["versions"].get(name)
            if seen != wanted:
                return (
                    f"rank {rank} ({r['host']}) has {name} {seen}, rank 0 ({first['host']}) {wanted}; install the same."
                )
        if r["weights"] != first["weights"]:
            return (
                f"rank {rank} ({r['host']}) has other weights than rank 0 ({first['host']}): fingerprints "
                f"{r['weights'][:8]} and {first['weights'][:8]}; copy the same checkpoint to both."
            )
    return None


def compare(records: list[dict[str, Any]]) -> None:
    """Raises DistributedError where there is a `difference`."""
    found = difference(records)
    if found:
        raise DistributedError(found)
