"""Divergence of our conversions and of mlx_lm.convert's from the same float model: ``python -m benchmarks.convert_quality``.

Every conversion starts from the float form of the checkpoint. The table gives bytes, and KL divergence and top-1 flips
over the answers of the packaged conversations and over all their tokens; "ours, same size" has mlx-lm's 8-bit router.
Holds the models in memory: meant for a small checkpoint.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert as mlx_lm_convert

from benchmarks.sensitivity import Judge
from ring_mlx import demo_model_path
from ring_mlx.convert import convert

SAME_ROUTER = {"overrides": ["mlp.gate.gate_proj=8"]}


def size(folder: Path) -> int:
    """Bytes of the shards."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--bits", default="4", help="uniform bits, with commas (4)")
    parser.add_argument("--recipes", default="ring-q4", help="with commas (ring-q4)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=48)
    args = parser.parse_args()
    versions = f"mlx {mx.__version__}, mlx-lm {version('mlx-lm')}"
    print(f"{args.model} on {platform.machine()}, {versions}, {args.rows} rows, group {args.group_size}")
    print(f"{'conversion':28} {'bytes':>12} {'KL answers':>11} {'KL all':>9} {'99 % all':>9} {'flips all':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        plain = convert(args.model, Path(scratch) / "float", dequantize=True)
        judge = Judge(plain, args.rows)

        def show(name: str, folder: Path) -> float:
            found = judge.measure(folder)
            print(
                f"{name:28} {size(folder):12,} {found.answers:11.6f} {found.mean:9.6f} {found.high:9.5f} "
                f"{found.flips:9.2%}",
                flush=True,
            )
            return found.mean

        for bits in map(int, args.bits.split(",")):
            theirs = Path(scratch) / f"theirs-{bits}"
            mlx_lm_convert(str(plain), str(theirs), quantize=True, q_bits=bits, q_group_size=args.group_size)
            base = show(f"mlx_lm.convert -q, {bits} bits", theirs)
            common = {"quantize": True, "bits": bits, "group_size": args.group_size}
            for name, changes in (
                ("rounding", {"fit": "rtn"} | SAME_ROUTER),
                ("same size", SAME_ROUTER),
                ("default", {}),
            ):
                mean = show(
                    f"ours, {name}, {bits} bits", convert(plain, Path(scratch) / f"{name}-{bits}", **common | changes)
                )
                print(f"{'':28} mlx-lm's mean over it: {base / mean:.2f}")
        for recipe in filter(None, args.recipes.split(",")):
            show(
                recipe, convert(plain, Path(scratch) / recipe, quantize=True, group_size=args.group_size, recipe=recipe)
            )


if __name__ == "__main__":
    main()
