"""Which modules quantisation harms: ``python -m benchmarks.sensitivity --model FOLDER --bits 4,3``.

Quantises one kind of module at a time, everything else left in float, and prints the mean KL divergence from the float
model, over the answers and over all of the packaged conversations, beside the bytes that it saves. Holds the model in
memory: meant for a small checkpoint.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ring_mlx import demo_model_path, load_model
from ring_mlx.convert import convert, convert_plan, report
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import quantisable_paths
from ring_mlx.evaluation.divergence import divergence

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


@dataclass(frozen=True)
class Found:
    """Mean KL over the answers; mean and 99 % of KL and the part of flipped tokens over everything."""

    answers: float
    mean: float
    high: float
    flips: float


class Judge:
    """The float model's logits on some batches, and what another model's differ from them by."""

    def __init__(self, folder: Path, rows: int) -> None:
        text = [r for r in report.read_text() if "messages" in r][:rows]
        self._batches = report.make_batches(folder, text)
        self._logits = self._run(folder)

    def measure(self, folder: Path) -> Found:
        """KL and flips of another model over the answers and over everything."""
        answers, everything, flips = [], [], []
        for batch, left, right in zip(self._batches, self._logits, self._run(folder), strict=True):
            for i, (first, end) in enumerate(batch.spans):
                kl, flip, _, _ = divergence(left[i, : end - 1], right[i, : end - 1], batch.tokens[i, 1:end])
                everything.append(kl)
                answers.append(kl[first - 1 :])
                flips.append(flip)
        whole = np.concatenate(everything)
        return Found(
            float(np.concatenate(answers).mean()),
            float(whole.mean()),
            float(np.quantile(whole, 0.99)),
            float(np.concatenate(flips).mean()),
        )

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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--bits", default="4")
    parser.add_argument("--rows", type=int, default=24, help="conversations of the packaged text")
    parser.add_argument("--fit", default="search", choices=("search", "rtn"))
    parser.add_argument("--only", help="one kind by name, such as 'not routed experts'")
    parser.add_argument("--layers", action="store_true", help="also the routed experts of each layer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plain = convert(args.model, Path(scratch) / "float", dequantize=True, dtype=mx.float32)
        source, _ = convert_plan(plain, Options())
        judge, kinds = Judge(plain, args.rows), dict(KINDS)
        if args.layers:
            layers = sorted({int(p.split(".")[2]) for p in quantisable_paths(source.config) if ".switch_mlp." in p})
            kinds |= {f"experts of layer {i}": [f"layers.{i}.mlp.switch_mlp"] for i in layers}
        kinds = {k: p for k, p in kinds.items() if args.only in (None, k)}
        print(f"{args.model} on {platform.machine()}, mlx {mx.__version__}, {args.rows} rows, fit {args.fit}")
        print(
            f"{'quantised':20} {'bits':>4} {'KL answers':>11} {'KL all':>11} {'weights':>10} {'KL all per bit saved':>21}"
        )
        for bits in map(int, args.bits.split(",")):
            for kind, patterns in kinds.items():
                options = overrides_for(patterns, bits)
                _, plan = convert_plan(plain, Options(quantize=True, bits=bits, overrides=options))
                touched = [o for o in plan.outputs if o.setting is not None]
                if not touched:
                    continue
                out = convert(
                    plain, Path(scratch) / f"{kind}-{bits}", quantize=True, bits=bits, overrides=options, fit=args.fit
                )
                found = judge.measure(out)
                weights, real = sum(o.count for o in touched), touched[0].setting.bits
                print(
                    f"{kind:20} {real:4} {found.answers:11.6f} {found.mean:11.6f} {weights:10,} "
                    f"{found.mean / (weights * (16 - real)):21.3g}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
