"""Our calibrated conversions beside mlx_lm's gptq, awq and dwq at equal size: ``python -m benchmarks.calibrated_quality --bits 4,3``.

All from the float form of one checkpoint, and calibrated on the same text, the packaged one's conversations: bytes, seconds, and the
divergence from the float model over all tokens of the packaged report's conversations. Holds the models in memory: for a small checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import convert as mlx_lm_convert
from mlx_lm.models import bailing_moe_linear as stock
from mlx_lm.quant import awq, dwq, gptq
from mlx_lm.utils import load_model, quantize_model, save

from benchmarks.common import arguments, counts, report
from benchmarks.sensitivity import Judge
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.convert import calibration, convert
from ring_mlx.convert import report as packaged
from ring_mlx.model.decay import decay_rate

# Of a row; dwq's own learning rate.
WIDTH, LEARNING_RATE = 256, 1e-6


def token_rows(folder: Path, text: list[dict[str, Any]]) -> mx.array:
    """The text in rows of one length [n, WIDTH], as mlx_lm's tools take it."""
    batches = packaged.make_batches(folder, text)
    ids = [t for b in batches for row, (_, end) in zip(b.tokens.tolist(), b.spans, strict=True) for t in row[:end]]
    return mx.array(ids[: len(ids) // WIDTH * WIDTH]).reshape(-1, WIDTH)


def saved(plain: Path, out: Path, make: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]) -> Path:
    """What a tool of mlx_lm makes of the model, as it would be saved. MLX's products of experts on a processor need float32."""
    model, config = load_model(plain)
    kept = {name for name, array in tree_flatten(model.parameters()) if array.dtype == mx.float32}
    if is_cpu := mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    model, config = make(model, config)
    if is_cpu:
        floats = [(n, a) for n, a in tree_flatten(model.parameters()) if a.dtype == mx.float32 and n not in kept]
        model.update(tree_unflatten([(n, a.astype(mx.bfloat16)) for n, a in floats]))
    save(out, plain, model, load_tokenizer(plain), config)
    return out


def theirs(
    plain: Path, rows: mx.array, bits: int, group: int, dwq_rows: int
) -> dict[str, Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]]:
    """mlx_lm's tools; each takes a model and its config. Of the rows dwq, which trains on them, takes so many, evenly."""

    def by_gptq(model: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Ends and routers, which it does not calibrate, get its fallback of the same bits.
        model, config["quantization"] = gptq.gptq_quantize(model, rows, bits, group, bits, group)
        return model, config

    def by_awq(model: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        awq.awq_quantize(model, rows, awq.AWQ_MODEL_CONFIGS[config["model_type"]], group_size=group, bits=bits)
        return model, awq.update_config(model, config)

    def by_dwq(model: Any, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        student, _ = load_model(plain)
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        student.set_dtype(dtype)
        student, config = quantize_model(student, config, group, bits)
        step = max(1, len(rows) // dwq_rows)
        data = [(row, 0) for row in rows[::step][:dwq_rows].tolist()]
        opt = Adam(learning_rate=LEARNING_RATE, bias_correction=True)
        dwq.dwq_quantize(student, lambda x, *_, **__: model(x), opt, data, data[:8], 4, WIDTH, seed=0, dtype=dtype)
        return student, config

    return {"gptq": by_gptq, "awq": by_awq, "dwq": by_dwq}


def rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """One for each conversion; a tool that fails is a row that says how."""
    # The decay that the checkpoint was trained with, which mlx-lm's model has otherwise.
    stock.LinearAttention._get_slopes = lambda self: (
        -decay_rate(self.num_attention_heads, self.layer_idx, self.num_hidden_layers)
    )
    plain = convert(args.model, scratch / "float", dequantize=True)
    judge, base = Judge(plain, args.rows), None
    text = [r for r in packaged.read_text(packaged=calibration.TEXT) if "messages" in r]

    def row(name: str, make: Callable[[], Path]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            folder = make()
        except Exception as e:  # noqa: BLE001 whatever another's tool raises is its row
            return {"conversion": name, "failed": f"{type(e).__name__}: {e}"[:90]}
        took_s = time.perf_counter() - started
        _, d = judge.measure(folder)
        nbytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        found = {
            "conversion": name,
            "bytes": nbytes,
            "s": took_s,
            "KL": d.kl_mean,
            "median": d.kl_median,
            "99 %": d.kl_99,
        }
        return found | {"flips": d.flips, "rounding's KL over it": base and base / d.kl_mean}

    for bits in args.bits:
        base, out = None, scratch / str(bits)
        # mlx-lm's router has 8 bits.
        same = {"quantize": True, "group_size": args.group_size, "overrides": ["mlp.gate.gate_proj=8"]}
        how = same | {"bits": bits}
        first = row(
            f"mlx_lm.convert -q, {bits} bits",
            lambda bits=bits, out=out: (
                mlx_lm_convert(str(plain), str(out / "rtn"), quantize=True, q_bits=bits, q_group_size=args.group_size)
                or out / "rtn"
            ),
        )
        yield first
        base, size = first["KL"], first["bytes"]
        tools = theirs(plain, token_rows(plain, text), bits, args.group_size, args.dwq_rows)
        for name in filter(None, args.tools.split(",")):
            tool = tools[name]
            yield row(f"mlx_lm.{name}", lambda out=out, name=name, tool=tool: saved(plain, out / name, tool))
        yield row("ours, -q", lambda out=out, how=how: convert(plain, out / "fit", **how))
        yield row("--calibrate", lambda out=out, how=how: convert(plain, out / "cal", **how, calibrate=True, text=text))
        target = same | {"text": text, "target_bytes": size}
        yield row("--target-size", lambda out=out, t=target: convert(plain, out / "target", **t))
        yield row(
            "--calibrate --target-size", lambda out=out, t=target: convert(plain, out / "both", **t, calibrate=True)
        )


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, model=True)
    parser.add_argument("--bits", type=counts, default=(4, 3), help="with commas (4,3)")
    parser.add_argument("--tools", default="gptq,awq,dwq", help="of mlx_lm, with commas (gptq,awq,dwq)")
    parser.add_argument("--dwq-rows", type=int, default=32, help=f"of {WIDTH} tokens, in steps of four (32)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=36)
    args = parser.parse_args()
    about = args.model, f"mlx-lm {version('mlx-lm')}", f"{args.rows} rows", f"group {args.group_size}"
    with tempfile.TemporaryDirectory() as scratch:
        report(args, rows(args, Path(scratch)), *about)


if __name__ == "__main__":
    main()
