"""Memory of each rank of a model shared by processes on this machine: ``python -m benchmarks.distributed_memory``.

Makes a 4-bit checkpoint of mini's layers with fewer experts and a smaller vocabulary, loads it in one process and in 2
and 4 ranks both ways, and generates a few tokens. Prints for each rank the bytes of its parameters, MLX's peak, and the
peak of resident memory over what the program takes before it opens the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.common import arguments, report, resident_peak_bytes
from ring_mlx.bench.random_weights import random_model_of
from ring_mlx.bench.shapes import MINI
from ring_mlx.checkpoint.loading import load_model
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.generation.decoding import generate_step

MODES = ((1, "whole"), (2, "tensor"), (2, "pipeline"), (4, "tensor"), (4, "pipeline"))


def write_checkpoint(folder: Path, layers: int, experts: int, vocab: int) -> None:
    """Random packed weights."""
    raw = MINI | {"num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab, "torch_dtype": "bfloat16"}
    raw["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"}
    model = random_model_of(raw, "benchmark", 4, 64, False, mx.bfloat16, 0)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(raw))


def rank(folder: str, mode: str, tokens: int) -> None:
    """Load and generate; prints what it took as JSON."""
    mx.eval(mx.quantized_matmul(mx.ones((1, 64)), *mx.quantize(mx.ones((64, 64)))))
    group = None if mode == "whole" else mx.distributed.init(strict=True)
    before, started = resident_peak_bytes(), time.perf_counter()
    if group is None:
        model = load_model(folder, dtype=mx.bfloat16)
    else:
        model = load_sharded(folder, group, mode, dtype=mx.bfloat16)
    loaded_s = time.perf_counter() - started
    loaded = mx.get_active_memory()
    list(generate_step([1], model, model.make_cache(), max_tokens=tokens))
    parameters = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    found = [parameters, loaded, mx.get_peak_memory(), resident_peak_bytes() - before, loaded_s]
    print(json.dumps([group.rank() if group else 0, *found]))


def run(folder: Path, size: int, mode: str, tokens: int, scratch: Path) -> list[list[float]]:
    """The lines of all ranks, in order."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    file = scratch / "ring.json"
    file.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]))
    command = [sys.executable, "-m", "benchmarks.distributed_memory", "--rank", str(folder), mode, str(tokens)]
    processes = [
        subprocess.Popen(
            command, env=os.environ | {"MLX_RANK": str(r), "MLX_HOSTFILE": str(file)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(size)
    ]
    lines = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        raise SystemExit(f"a rank of {mode} failed; see above")
    return sorted(json.loads(line) for line in lines)


def rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """One for each rank."""
    folder = scratch / "model"
    write_checkpoint(folder, args.layers, args.experts, args.vocab)
    for size, mode in MODES:
        for number, parameters, _, peak, resident, seconds in run(folder, size, mode, args.tokens, scratch):
            sizes = {"parameters MB": parameters, "MLX peak MB": peak, "resident peak over start MB": resident}
            row = {"processes": size, "mode": mode, "rank": int(number)}
            yield row | {name: n / 1e6 for name, n in sizes.items()} | {"loaded in s": seconds}


def main() -> None:
    """Measure and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=20, help="in groups of five (20)")
    parser.add_argument("--experts", type=int, default=32, help="a layer, in 8 groups (32)")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=1, help="to generate (1)")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank[0], args.rank[1], int(args.rank[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        report(args, rows(args, Path(scratch)), f"{args.layers} layers of {args.experts} experts")


if __name__ == "__main__":
    main()
