"""Which modules quantization harms: ``python -m benchmarks.sensitivity --model FOLDER --bits 4,3``.

Quantizes one kind of module at a time, everything else left in float, and prints the mean KL divergence from the float
model, over the answers and over all of the packaged conversations, beside the bytes that it saves. Holds the model in
memory: meant for a small checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.common import arguments, counts, report
from ring_mlx import load_model
from ring_mlx.convert import convert, convert_plan
from ring_mlx.convert import report as packaged
from ring_mlx.convert.fit import EFFORTS
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import quantizable_paths
from ring_mlx.evaluation.divergence import Divergence, divergence, summary

KINDS = {
    "embeddings": ["word_embeddings"],
    "query_key_value": ["query_key_value"],
    "dense": ["attention.dense"],
    "g_proj": ["g_proj"],
    "dense MLP": ["layers.0.mlp"],
    "shared experts": ["shared_experts"],
    "experts gate, up": ["switch_mlp.gate_proj", "switch_mlp.up_proj"],
    "experts down": ["switch_mlp.down_proj"],
    "router (8 bits)": ["mlp.gate.gate_proj"],
    "head": ["lm_head"],
    "all but router": [""],
    "not routed experts": ["", "!switch_mlp"],
}


class Judge:
    """The float model's logits on some batches, and what another model's differ from them by."""

    def __init__(self, folder: Path, rows: int) -> None:
        text = [r for r in packaged.read_text() if "messages" in r][:rows]
        self._batches = packaged.make_batches(folder, text)
        self._logits = self._run(folder)

    def measure(self, folder: Path) -> tuple[Divergence, Divergence]:
        """Of another model, over the answers and over everything."""
        answers, everything = [], []
        for batch, left, right in zip(self._batches, self._logits, self._run(folder), strict=True):
            for i, (first, end) in enumerate(batch.spans):
                everything.append(divergence(left[i, : end - 1], right[i, : end - 1], batch.tokens[i, 1:end]))
                answers.append(everything[-1][:, first - 1 :])
        return summary(answers), summary(everything)

    def _run(self, folder: Path) -> list[mx.array]:
        model, out = load_model(folder, dtype=mx.float32), []
        for batch in self._batches:
            out.append(model(batch.tokens))
            mx.eval(out[-1])
        return out


def overrides_for(patterns: list[str], bits: int) -> list[str]:
    """Everything in float but the modules that match; a leading ! excludes."""
    bits = 8 if "mlp.gate.gate_proj" in patterns else bits
    return ["*=none", *(f"{p[1:]}=none" if p.startswith("!") else f"{p or '*'}={bits}" for p in patterns)]


def rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """One for each kind of module and number of bits."""
    plain = convert(args.model, scratch / "float", dequantize=True, dtype=mx.float32)
    source, _ = convert_plan(plain, Options())
    judge, kinds = Judge(plain, args.rows), dict(KINDS)
    if args.each_layer:
        layers = sorted({int(p.split(".")[2]) for p in quantizable_paths(source.config) if ".switch_mlp." in p})
        kinds |= {f"experts of layer {i}": [f"layers.{i}.mlp.switch_mlp"] for i in layers}
    for bits in args.bits:
        for kind, patterns in ((k, p) for k, p in kinds.items() if args.only in (None, k)):
            options = overrides_for(patterns, bits)
            _, plan = convert_plan(plain, Options(quantize=True, bits=bits, overrides=options))
            if not (touched := [o for o in plan.outputs if o.setting is not None]):
                continue
            how = {"quantize": True, "bits": bits, "overrides": options, "fit": args.fit}
            answers, whole = judge.measure(convert(plain, scratch / f"{kind}-{bits}", **how))
            weights, real = sum(o.count for o in touched), touched[0].setting.bits
            row = {"quantized": kind, "bits": real, "KL answers": answers.kl_mean, "KL all": whole.kl_mean}
            yield row | {"weights": weights, "KL all per bit saved": whole.kl_mean / (weights * (16 - real))}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--bits", type=counts, default=(4,), help="with commas (4)")
    parser.add_argument("--rows", type=int, default=24, help="conversations of the packaged text")
    parser.add_argument("--fit", default="fast", choices=tuple(EFFORTS))
    parser.add_argument("--only", help="one kind by name, such as 'not routed experts'")
    parser.add_argument("--each-layer", "--layers", action="store_true", help="also the routed experts of each layer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(args, rows(args, Path(scratch)), args.model, f"{args.rows} rows", f"fit {args.fit}")


if __name__ == "__main__":
    main()
