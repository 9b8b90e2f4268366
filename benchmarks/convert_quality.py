"""Divergence of our conversions and of mlx_lm.convert's from the same float model: ``python -m benchmarks.convert_quality``.

Every conversion starts from the float form of the checkpoint. The table gives bytes, and KL divergence and top-1 flips
over the answers of the packaged conversations and over all their tokens; "ours, same size" has mlx-lm's 8-bit router.
Holds the models in memory: meant for a small checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm import convert as mlx_lm_convert

from benchmarks.common import arguments, counts, report
from benchmarks.sensitivity import Judge
from ring_mlx.convert import convert

SAME_ROUTER = {"overrides": ["mlp.gate.gate_proj=8"]}
WAYS: dict[str, dict[str, Any]] = {"rounding": {"fit": "rtn"} | SAME_ROUTER, "same size": SAME_ROUTER, "default": {}}


def rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """One for each conversion; those of one number of bits after mlx-lm's, whose mean KL is divided by theirs."""
    plain = convert(args.model, scratch / "float", dequantize=True)
    judge, base = Judge(plain, args.rows), None

    def row(name: str, folder: Path) -> dict[str, Any]:
        answers, whole = judge.measure(folder)
        nbytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        found = {"conversion": name, "bytes": nbytes, "KL answers": answers.kl_mean, "KL all": whole.kl_mean}
        found |= {"99 % all": whole.kl_99, "flips all": whole.flips}
        return found | {"mlx-lm's KL over it": base and base / whole.kl_mean}

    for bits in args.bits:
        theirs, base = scratch / f"theirs-{bits}", None
        mlx_lm_convert(str(plain), str(theirs), quantize=True, q_bits=bits, q_group_size=args.group_size)
        first = row(f"mlx_lm.convert -q, {bits} bits", theirs)
        yield first
        base = first["KL all"]
        for name, changes in WAYS.items():
            how = {"quantize": True, "bits": bits, "group_size": args.group_size} | changes
            yield row(f"ours, {name}, {bits} bits", convert(plain, scratch / f"{name}-{bits}", **how))
    base = None
    for recipe in filter(None, args.recipes.split(",")):
        how = {"quantize": True, "group_size": args.group_size, "recipe": recipe}
        yield row(recipe, convert(plain, scratch / recipe, **how))


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--bits", type=counts, default=(4,), help="uniform bits, with commas (4)")
    parser.add_argument("--recipes", default="ring-q4", help="with commas (ring-q4)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=48)
    args = parser.parse_args()
    about = args.model, f"mlx-lm {version('mlx-lm')}", f"{args.rows} rows", f"group {args.group_size}"
    with tempfile.TemporaryDirectory() as scratch:
        report(args, rows(args, Path(scratch)), *about)


if __name__ == "__main__":
    main()
