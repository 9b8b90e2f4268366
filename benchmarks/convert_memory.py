"""Peak memory of conversions as the model grows: ``python -m benchmarks.convert_memory --layers 2,4,8``.

Writes checkpoints of random bfloat16 weights in the Hugging Face form, one tensor an expert, and converts each in a process
of its own. Prints peak resident memory over that of the same program before it opens the source, beside the largest
stacked tensor; the bound is twice that tensor plus 1 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.common import arguments, counts, report
from ring_mlx.bench.shapes import MINI
from ring_mlx.checkpoint.safetensors_header import TensorSpec
from ring_mlx.convert.shard_files import ShardFile
from ring_mlx.convert.sources import parameter_shapes
from ring_mlx.model.config import RingConfig

CHILD = """
import json, sys, time
import mlx.core as mx
from benchmarks.common import resident_peak_bytes as peak
from ring_mlx.convert import convert
from ring_mlx.convert.fit import quantize
from ring_mlx.convert.recipes import Setting
mx.eval(quantize(mx.ones((64, 64)), Setting(64, 4), mx.bfloat16))
before, started = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps([before, peak(), time.perf_counter() - started, mx.get_peak_memory()]))
"""
SHARD_BYTES = 1 << 30


def write_source(folder: Path, layers: int, experts: int, vocab: int) -> int:
    """A checkpoint of mini's shapes with random weights; returns its bytes. Only a shard's header is ever whole."""
    raw = MINI | {"num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab, "torch_dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors: list[TensorSpec] = []
    for name, shape in parameter_shapes(RingConfig.from_dict(raw)).items():
        if ".switch_mlp." in name:
            names = [(name.replace("switch_mlp.", f"experts.{e}."), shape[1:]) for e in range(experts)]
        else:
            names = [(name.replace(".mlp.gate.gate_proj.", ".mlp.gate."), shape)]
        tensors += [TensorSpec(n, "BF16", s) for n, s in names]
    groups: list[list[TensorSpec]] = [[]]
    for t in tensors:
        if sum(x.nbytes for x in groups[-1]) + t.nbytes > SHARD_BYTES and groups[-1]:
            groups.append([])
        groups[-1].append(t)
    noise = mx.random.normal((1 << 20,)).astype(mx.bfloat16) * 0.02
    for i, group in enumerate(groups):
        file = ShardFile(folder / f"model-{i:05d}.safetensors", group)
        for t in group:
            for at in range(0, t.nbytes, noise.nbytes):
                file.write(t.name, at, noise[: min(noise.size, (t.nbytes - at) // 2)])
        file.close()
    return sum(t.nbytes for t in tensors)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each number of layers."""
    largest = max(2 * args.experts * 2048 * 512, 2 * args.vocab * 2048)
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            source = Path(scratch) / "source"
            size = write_source(source, layers, args.experts, args.vocab)
            command = [sys.executable, "-c", CHILD, str(source), str(Path(scratch) / "out"), args.options]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            before, peak, seconds, mlx = json.loads(result.stdout.splitlines()[-1])
            sizes = {"source": size, "largest": largest, "before": before, "peak": peak, "grown": peak - before}
            sizes |= {"bound": 2 * largest + 10**9, "MLX": mlx}
            yield {"layers": layers} | {f"{name} MB": n / 1e6 for name, n in sizes.items()} | {"s": seconds}
            if sizes["grown"] > sizes["bound"]:
                sys.exit("the bound is exceeded")


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=counts, default=(2, 4, 8), help="with commas (2,4,8); layer 0 is dense")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--options", default='{"quantize": true, "fit": "rtn"}', help="of convert, as JSON")
    parser.add_argument("--dir", help="where to work, by default a temporary folder")
    args = parser.parse_args()
    report(args, rows(args), mx.default_device(), f"{args.experts} experts", args.options)


if __name__ == "__main__":
    main()
