"""Lets the libraries that quantize for other engines write one matrix in each of their forms: tests/foreign_files.

    pip install --group foreign && python -m tests.make_foreign_files

Each file is a shard with the tensors of MODULE; its metadata has the ``quantization_config`` that belongs into
config.json, and what wrote it. Every file is checked against the library's own dequantization before it is kept.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from tests.foreign_meaning import meaning, read

FILES = Path(__file__).parent / "foreign_files"
MODULE = "model.layers.1.mlp.shared_experts.up_proj"
ROWS, COLS = 96, 128
PART = "model.layers.0.self_attn.q_proj"

Tensors = dict[str, torch.Tensor]


def keep(name: str, by: str, quantization: dict[str, Any], tensors: Tensors, expected: torch.Tensor) -> None:
    """Write a file, and compare its meaning to what the library says."""
    metadata = {"quantization_config": json.dumps(quantization, default=str), "by": f"{by} {version(by)}"}
    file = FILES / f"{name}.safetensors"
    save_file({f"{MODULE}.{suffix}": t.contiguous() for suffix, t in tensors.items()}, file, metadata)
    parts, written = read(file)
    ours = meaning(parts, json.loads(written["quantization_config"]))
    theirs = expected.to(torch.float64).numpy()
    off = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name:24} {file.stat().st_size:7} bytes, {off:.1e} from the library's own", flush=True)
    assert off < 1e-6


def llm_compressor(name: str, modifier: Any) -> None:
    """One projection of a tiny Llama, quantized and saved by llm-compressor."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        shape = {"hidden_size": COLS, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": ROWS // 8}
        config = LlamaConfig(intermediate_size=64, num_hidden_layers=1, vocab_size=64, dtype="bfloat16", **shape)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(f"{scratch}/float")
        model = AutoModelForCausalLM.from_pretrained(f"{scratch}/float", dtype=torch.bfloat16)
        oneshot(model=model, recipe=modifier)
        model.save_pretrained(f"{scratch}/out", save_compressed=True)
        raw = json.loads(Path(scratch, "out", "config.json").read_text())["quantization_config"]
        tensors = load_file(f"{scratch}/out/model.safetensors")
    own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{PART}.")}
    args = next(g for g in raw["config_groups"].values() if g["targets"] != ["re:.*o_proj"])
    scheme = QuantizationScheme.model_validate({k: v for k, v in args.items() if k != "format"})
    exact = {suffix: t.float() if suffix == "weight_scale" else t for suffix, t in own.items()}
    expected = BaseCompressor.get_value_from_registry(args["format"]).decompress(exact, scheme)["weight"]
    keep(name, "llmcompressor", raw, own, expected)


def scheme(bits: int, kind: str = "int", targets: str = "Linear", **args: Any) -> dict[str, Any]:
    weights = QuantizationArgs(num_bits=bits, type=kind, **args)
    return {"targets": [targets], "weights": weights}


def modifier(*schemes: dict[str, Any]) -> Any:
    groups = {f"group_{i}": QuantizationScheme(**s) for i, s in enumerate(schemes)}
    return QuantizationModifier(config_groups=groups, ignore=["lm_head"])


def gptq(name: str, bits: int, group: int = 32, is_first: bool = True, order: bool = False, sym: bool = False) -> None:
    """A matrix with zero points of 0 (unless it is symmetric), packed by gptqmodel."""
    torch.manual_seed(bits)
    top, size = (1 << bits) - 1, COLS if group < 0 else group
    scales = (torch.rand(ROWS, COLS // size) * 0.02 + 0.001).to(torch.float16).float()
    zeros = torch.randint(0, top + 1, scales.shape)
    zeros[::3] = 0
    if sym:
        zeros[:] = (top + 1) // 2
    g_idx = torch.arange(COLS) // size
    if order:
        g_idx = g_idx[torch.randperm(COLS)]
    codes = torch.randint(0, top + 1, (ROWS, COLS))
    weights = scales[:, g_idx] * (codes - zeros[:, g_idx])
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data = weights
    packed = TorchLinear(bits, group, sym, order, COLS, ROWS)
    packed.pack(linear, scales, zeros, g_idx.to(torch.int32))
    form = "gptq" if is_first else "gptq_v2"
    quantization = QuantizeConfig(bits=bits, group_size=group, sym=sym, desc_act=order, format=form)
    if is_first:
        convert_gptq_v2_to_v1_format_module(packed, quantization)
    own = {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales", "g_idx")}
    raw = {k: v for k, v in quantization.to_dict().items() if k != "meta"}  # names folders of the machine
    keep(name, "gptqmodel", raw, own, weights)


def finegrained(name: str, **options: Any) -> None:
    torch.manual_seed(0)
    config = FineGrainedFP8Config(**options)
    quantizer = SimpleNamespace(quantization_config=config)
    made = Fp8Quantize(quantizer)._quantize_one("a.weight", torch.randn(ROWS, COLS) * 0.02)
    expected = Fp8Dequantize(quantizer)._dequantize_one(made["a.weight"], made["a.weight_scale_inv"])
    raw = json.loads(config.to_json_string(use_diff=False))
    keep(name, "transformers", raw, {k.removeprefix("a."): v for k, v in made.items()}, expected)


def main() -> None:
    FILES.mkdir(exist_ok=True)
    for bits in (2, 3, 4, 8):
        gptq(f"gptq_{bits}", bits)
    gptq("gptq_v2", 4, is_first=False)
    gptq("gptq_act_order", 4, order=True)
    gptq("gptq_symmetric", 4, group=64, sym=True)
    gptq("gptq_a_row", 4, group=-1)
    finegrained("fp8_blocks", weight_block_size=(32, 64))
    finegrained("fp8_powers_of_two", weight_block_size=(32, 64), scale_fmt="ue8m0")
    finegrained("fp8_whole", weight_block_size=None)
    group = {"strategy": "group", "group_size": 32}
    for name, made in {
        "ct_fp8_blocks": modifier(scheme(8, "float", strategy="block", block_structure=[32, 64])),
        "ct_fp8_rows": modifier(scheme(8, "float", strategy="channel")),
        "ct_fp8_whole": modifier(scheme(8, "float", strategy="tensor")),
        "ct_mxfp8": QuantizationModifier(targets="Linear", scheme="MXFP8A16", ignore=["lm_head"]),
        "ct_int4": modifier(scheme(4, **group)),
        "ct_int4_zeros": modifier(scheme(4, symmetric=False, **group)),
        "ct_int4_rows": modifier(scheme(4, strategy="channel", symmetric=False)),
        "ct_int3": modifier(scheme(3, symmetric=False, **group)),
        "ct_int8": modifier(scheme(8, **group)),
        "ct_mixed": modifier(
            scheme(4, targets="re:.*(q|k|v|gate|up|down)_proj", **group), scheme(8, targets="re:.*o_proj", **group)
        ),
    }.items():
        llm_compressor(name, made)


if __name__ == "__main__":
    main()
