"""Reading of a checkpoint's files beside what the disk gives: ``python -m benchmarks.disk_reading --model FOLDER``.

The same shards are read by plain sequential reads, as a conversion reads them (`TensorFiles`, two million numbers at a time), and as a model is
loaded; cold, with the system told to forget the files, and warm. Each in alternation: gigabytes a second, and the share of plain reads.
Where the system does not forget files (macOS), cold rows are left out; restart, and use ``-n 1``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.common import alternate, arguments, report
from ring_mlx import load_model
from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.convert.encoding import CHUNK_WEIGHTS

BLOCK_BYTES = 8 << 20


def plainly(folder: Path) -> None:
    """Every shard from its first byte to its last."""
    room = bytearray(BLOCK_BYTES)
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def as_converted(folder: Path) -> None:
    """Every tensor, some rows at a time."""
    with closing(TensorFiles()) as files:
        for tensor in sorted(read_tensors(folder).values(), key=lambda t: (t.file, t.start)):
            rows, cols = tensor.matrix
            step = max(1, CHUNK_WEIGHTS // cols)
            for start in range(0, rows, step):
                mx.eval(files.read(tensor, start, min(rows, start + step)))


def as_loaded(folder: Path) -> None:
    """A model with its weights in memory."""
    mx.eval(load_model(folder).parameters())


def seconds(work: Callable[[Path], None], folder: Path, is_cold: bool) -> float:
    """Of one reading."""
    if is_cold:
        for shard in folder.glob("*.safetensors"):
            with shard.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    work(folder)
    return time.perf_counter() - started


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each way, cold and warm."""
    folder = Path(args.model)
    gigabytes = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9
    ways = {"plain reads": plainly, "convert": as_converted, "load_model": as_loaded}
    for is_cold in (True, False) if hasattr(os, "posix_fadvise") else (False,):
        found = alternate({n: partial(seconds, work, folder, is_cold) for n, work in ways.items()}, args.repeats)
        for name, times in found.items():
            share = [100 * a / b for a, b in zip(found["plain reads"], times, strict=True)]
            yield {
                "files": "cold" if is_cold else "warm",
                "reading": name,
                "GB/s": [gigabytes / t for t in times],
                "%": share,
            }


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True, repeats=5)
    args = parser.parse_args()
    report(args, rows(args), args.model)


if __name__ == "__main__":
    main()
