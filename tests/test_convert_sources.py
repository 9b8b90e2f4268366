"""Sources that other makers quantized come back as the weights that they mean."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import ring_mlx
from ring_mlx import demo_model_path, load_model
from ring_mlx.checkpoint.safetensors_header import TensorSpec
from ring_mlx.checkpoint.shards import read_tensors
from ring_mlx.checkpoint.tensor_files import TensorFiles
from ring_mlx.cli import main
from ring_mlx.convert import conversion, convert
from ring_mlx.convert.shard_files import ShardFile
from ring_mlx.errors import OptionError, WeightsError
from tests import foreign
from tests.compare import assert_close, relative_rms
from tests.tiny import config, save_hf, tokens

CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "desc_act": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "asymmetric": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "ordered": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [96, 96]},
}


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """So that no matrix is read in one piece, and pieces begin within blocks and experts."""
    monkeypatch.setattr(conversion, "CHUNK_WEIGHTS", 5000)


def mixed_order(cols):
    return np.random.default_rng(5).permutation(np.arange(cols) // 64)


def pack_one(kind, w):
    order = mixed_order(w.shape[1])
    return {
        "gptq": lambda: foreign.gptq(w, 64, None),
        "gptq_v2": lambda: foreign.gptq(w, 64, None, v2=True),
        "desc_act": lambda: foreign.gptq(w, 64, order),
        "compressed": lambda: foreign.compressed(w, 64, True),
        "asymmetric": lambda: foreign.compressed(w, 64, False),
        "ordered": lambda: foreign.compressed(w, 64, True, order),
        "fp8": lambda: foreign.fp8(w, 96),
    }[kind]()


@pytest.fixture(scope="module", params=list(CONFIGS))
def packed(request, tmp_path_factory):
    """A checkpoint of one kind: its name, folder, original weights and those that the packed form means."""
    kind, folder = request.param, tmp_path_factory.mktemp("packed") / request.param
    raw = foreign.shape()
    original, meant, tensors = foreign.float_weights(raw), {}, {}
    for name, value in original.items():
        if foreign.is_packed(name):
            parts, meant[name] = pack_one(kind, value)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": a for suffix, a in parts.items()}
        else:
            tensors[name] = value
            meant[name] = np.array(value)
    foreign.write(folder, raw | {"quantization_config": CONFIGS[kind]}, tensors)
    return kind, folder, original, meant


def by_expert(folder):
    """Parameters of a converted folder under the names of the source, dequantized by the loader's own arrays."""
    found = {}
    arrays = mx.load(str(folder / "model.safetensors"))
    for name, value in arrays.items():
        if name.endswith((".scales", ".biases")):
            continue
        base = name.removesuffix(".weight")
        if f"{base}.scales" in arrays:
            value = mx.dequantize(value, arrays[f"{base}.scales"], arrays[f"{base}.biases"], 64, 4)
        if ".switch_mlp." in name:
            found |= {name.replace("switch_mlp.", f"experts.{e}."): value[e] for e in range(value.shape[0])}
        else:
            found[name.replace(".mlp.gate.gate_proj.", ".mlp.gate.")] = value
    return found


def test_dequantized_it_means_the_same(packed, tmp_path):
    kind, folder, original, meant = packed
    found = by_expert(convert(folder, tmp_path / "out", dequantize=True))
    assert set(found) == set(meant)
    for name, value in found.items():
        assert_close(value, meant[name].astype(np.float32), 1e-6)
        assert relative_rms(value, np.array(original[name])) < (0.03 if kind == "fp8" else 0.15)
    assert load_model(tmp_path / "out")(tokens(9)).shape == (1, 9, 70)


def test_without_options_the_packed_form_is_kept_or_refused(packed, tmp_path):
    kind, folder, _, meant = packed
    if kind in ("desc_act", "ordered"):
        with pytest.raises(OptionError, match="add -q to requantize or -d to dequantize"):
            convert(folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    out = convert(folder, tmp_path / "out")
    scales = [n for n in mx.load(str(out / "model.safetensors")) if n.endswith(".scales")]
    assert len(scales) == (0 if kind == "fp8" else 8 + 3 + 2 * 6)
    for name, value in by_expert(out).items():
        assert_close(value, meant[name].astype(np.float32), 1e-6)


def test_requantized_to_eight_bits_it_stays_within_a_step(packed, tmp_path):
    _, folder, _, meant = packed
    out = convert(folder, tmp_path / "out", quantize=True, bits=8, fit="rtn")
    loaded = load_model(out)
    layer = loaded.layers[1].mlp.switch_mlp.up_proj
    back = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 8)
    for e in range(4):
        target = meant[f"model.layers.1.mlp.experts.{e}.up_proj.weight"]
        step = np.ptp(target.reshape(64, 2, 64), axis=-1, keepdims=True) / 255
        assert (np.abs(np.array(back[e]) - target).reshape(64, 2, 64) <= 1.02 * step).all()


@pytest.mark.parametrize("per_row", [True, False])
def test_float8_with_a_scale_a_row_or_one_for_all(tmp_path, per_row):
    raw = foreign.shape()
    tensors, name = foreign.float_weights(raw), "model.layers.0.attention.dense"
    w = tensors[f"{name}.weight"]
    scale = mx.abs(w).max(axis=1, keepdims=True) / 448 if per_row else mx.abs(w).max().reshape(1) / 448
    tensors |= {f"{name}.weight": mx.to_fp8(w / scale), f"{name}.weight_scale": scale}
    foreign.write(tmp_path / "in", raw, tensors)
    found = by_expert(convert(tmp_path / "in", tmp_path / "out"))[f"{name}.weight"]
    assert_close(found, mx.from_fp8(tensors[f"{name}.weight"], mx.float32) * scale, 1e-6)
    assert relative_rms(found, w) < 0.05


def test_columns_out_of_order_without_desc_act_are_refused(tmp_path):
    raw = foreign.shape()
    tensors, name = foreign.float_weights(raw), "model.layers.0.attention.dense"
    w = tensors.pop(f"{name}.weight")
    parts, _ = foreign.gptq(w, 64, mixed_order(w.shape[1]))
    foreign.write(
        tmp_path / "in",
        raw | {"quantization_config": CONFIGS["gptq"]},
        tensors | {f"{name}.{suffix}": a for suffix, a in parts.items()},
    )
    with pytest.raises(WeightsError, match="mixes columns of different groups"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"quant_method": "awq"}, "quantization method 'awq' is not supported"),
        ({"quant_method": "gptq", "bits": 3}, "has 3 bits in"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, changes, match):
    raw = foreign.shape()
    tensors = foreign.float_weights(raw)
    name = "model.layers.0.attention.dense"
    parts, _ = foreign.gptq(tensors.pop(f"{name}.weight"), 64, None)
    foreign.write(
        tmp_path / "in",
        raw | {"quantization_config": changes},
        tensors | {f"{name}.{suffix}": a for suffix, a in parts.items()},
    )
    with pytest.raises(WeightsError, match=match):
        convert(tmp_path / "in", tmp_path / "out")


def test_compressed_formats_that_are_not_integers_are_refused(tmp_path):
    raw = foreign.shape()
    tensors = foreign.float_weights(raw)
    name = "model.layers.0.attention.dense"
    parts, _ = foreign.compressed(tensors.pop(f"{name}.weight"), 64, True)
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    foreign.write(
        tmp_path / "in",
        raw | {"quantization_config": quantization},
        tensors | {f"{name}.{suffix}": a for suffix, a in parts.items()},
    )
    with pytest.raises(WeightsError, match="format 'nvfp4-pack-quantized' is not supported"):
        convert(tmp_path / "in", tmp_path / "out")


def test_float8_without_scales_is_refused(tmp_path):
    raw = foreign.shape()
    tensors = foreign.float_weights(raw)
    tensors["model.layers.0.attention.dense.weight"] = mx.to_fp8(tensors["model.layers.0.attention.dense.weight"])
    foreign.write(tmp_path / "in", raw, tensors)
    with pytest.raises(WeightsError, match=r"dense\.weight has dtype F8_E4M3 and nothing that scales it"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("mode", "bits"), [("affine", 3), ("affine", 8), ("mxfp4", None), ("mxfp8", None), ("nvfp4", None)]
)
def test_our_own_conversions_are_copied_dequantized_and_requantized(tmp_path, mode, bits):
    save_hf(tmp_path / "hf", foreign.shape())
    first = convert(tmp_path / "hf", tmp_path / "first", quantize=True, mode=mode, bits=bits, fit="rtn")
    copy = convert(first, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (copy / "config.json").read_text() == (first / "config.json").read_text()
    x = tokens(20)
    whole = load_model(convert(first, tmp_path / "whole", dequantize=True))
    assert not [n for n, _ in tree_flatten(whole.parameters()) if n.endswith("scales")]
    # An embedding in a float format dequantizes to bfloat16, whatever the model computes in.
    assert_close(whole(x), load_model(first)(x), 1e-4 if mode == "affine" else 0.02)
    again = convert(first, tmp_path / "again", quantize=True, bits=8, fit="rtn")
    assert load_model(again).layers[1].mlp.switch_mlp.up_proj.bits == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float_sources_of_every_width(tmp_path, dtype):
    model = save_hf(tmp_path / "hf", config(torch_dtype=dtype))
    tensors = mx.load(str(tmp_path / "hf" / "model.safetensors"))
    kind = getattr(mx, dtype)
    narrow = {n: a if n.endswith("expert_bias") else a.astype(kind) for n, a in tensors.items()}
    mx.save_safetensors(str(tmp_path / "hf" / "model.safetensors"), narrow)
    out = mx.load(str(convert(tmp_path / "hf", tmp_path / "out") / "model.safetensors"))
    assert out["model.layers.1.mlp.gate.expert_bias"].dtype == mx.float32
    assert {a.dtype for n, a in out.items() if not n.endswith("expert_bias")} == {kind}
    stacked = mx.stack([narrow[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(12)])
    assert mx.array_equal(out["model.layers.1.mlp.switch_mlp.up_proj.weight"], stacked)
    assert model.layers[1].mlp.switch_mlp.up_proj.weight.shape == stacked.shape


def test_a_shard_that_shrinks_or_goes_after_its_header_was_read_is_named(tmp_path):
    save_hf(tmp_path, config())
    path = tmp_path / "model.safetensors"
    tensors = read_tensors(tmp_path)
    last = max(tensors.values(), key=lambda t: t.end)
    path.write_bytes(path.read_bytes()[:-4])
    files = TensorFiles()
    with pytest.raises(WeightsError, match=rf"model\.safetensors ends within {last.name}"):
        files.read(last)
    files.close()
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        TensorFiles().read(last)


def test_arrays_are_written_in_order_of_their_rows_whatever_their_layout(tmp_path):
    x = mx.arange(6, dtype=mx.float32).reshape(2, 3).T.astype(mx.bfloat16)
    file = ShardFile(tmp_path / "a.safetensors", [TensorSpec("x", "BF16", (3, 2)), TensorSpec("y", "U8", (3,))])
    file.write("y", 0, mx.array([1, 2, 3], dtype=mx.uint8))
    file.write("x", 4, x[1:].T.T)
    file.write("x", 0, x[:1])
    file.close()
    back = mx.load(str(tmp_path / "a.safetensors"))
    assert back["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["y"].tolist() == [1, 2, 3]


def test_rows_past_a_tensor_are_not_read_from_the_next(tmp_path):
    save_hf(tmp_path, config())
    tensor = min(read_tensors(tmp_path).values(), key=lambda t: t.start)
    rows, files = tensor.matrix[0], TensorFiles()
    assert files.read(tensor, rows - 1).shape[0] == 1
    for start, stop in ((rows - 1, rows + 1), (rows, rows + 1), (-1, 1), (2, 1)):
        with pytest.raises(WeightsError, match=rf"{tensor.name} .* has {rows} rows, but {start} to {stop} are needed"):
            files.read(tensor, start, stop)
    files.close()


@pytest.mark.parametrize("quantized", [False, True])
def test_values_too_large_for_the_dtype_are_refused(tmp_path, quantized):
    raw = foreign.shape()
    tensors, name = foreign.float_weights(raw), "model.layers.0.attention.dense.weight"
    tensors[name] = mx.full(tensors[name].shape, 1e6, dtype=mx.bfloat16)
    foreign.write(tmp_path / "in", raw, tensors)
    with pytest.raises(WeightsError, match=rf"{name} holds values that are too large for float16; use --dtype bfloat"):
        convert(tmp_path / "in", tmp_path / "out", dtype=mx.float16, quantize=quantized)


DENSE = "model.layers.0.attention.dense"


def with_dense(folder, quantization, parts, **changes):
    """A checkpoint of which one matrix [128, 128] comes as ``parts`` makes it."""
    raw = foreign.shape()
    tensors = foreign.float_weights(raw)
    made = parts(tensors.pop(f"{DENSE}.weight"))
    changed = raw | {"quantization_config": quantization} | changes
    foreign.write(folder, changed, tensors | {f"{DENSE}.{suffix}": a for suffix, a in made.items()})


def gptq(**changes):
    return lambda w: foreign.gptq(w, 64, mixed_order(w.shape[1]))[0] | changes


def asymmetric(**changes):
    return lambda w: foreign.compressed(w, 64, False, mixed_order(w.shape[1]))[0] | changes


def fp8(**changes):
    return lambda w: foreign.fp8(w, 96)[0] | changes


def int32(*shape, value=0):
    return mx.full(shape, value, dtype=mx.int32)


@pytest.mark.parametrize(
    ("kind", "parts", "match"),
    [
        ("desc_act", gptq(g_idx=int32(128, value=2)), "g_idx names groups 2 to 2, but there are 2"),
        ("desc_act", gptq(g_idx=int32(128, value=10**9)), "g_idx names groups 1000000000 to"),
        ("desc_act", gptq(g_idx=int32(128, value=-1)), "g_idx names groups -1 to -1"),
        ("desc_act", gptq(g_idx=int32(64)), r"g_idx is I32 \(64,\) instead of I32 or I64 or U32 \(1, 128\)"),
        ("gptq", gptq(g_idx=int32(64)), "g_idx is I32"),
        ("gptq", gptq(qzeros=int32(2, 8)), r"qzeros is I32 \(2, 8\) instead of I32 or U32 \(2, 16\)"),
        ("gptq", gptq(scales=mx.ones((2, 64))), r"scales is F32 \(2, 64\) instead of"),
        ("gptq", gptq(scales=mx.ones((0, 128))), "has 4 bits in 0 groups of 128 columns"),
        ("gptq", gptq(qweight=mx.ones((16, 128))), "qweight is F32"),
        ("ordered", asymmetric(weight_g_idx=int32(128, value=2)), "weight_g_idx names groups 2 to 2"),
        ("ordered", asymmetric(weight_g_idx=int32(64)), "weight_g_idx is I32"),
        ("asymmetric", asymmetric(weight_zero_point=int32(8, 2)), "weight_zero_point is I32"),
        ("asymmetric", asymmetric(weight_scale=mx.ones((64, 2))), "weight_scale is F32"),
        ("asymmetric", asymmetric(weight_scale=mx.ones((384,))), "has 4 bits in 384 groups"),
        ("fp8", fp8(weight=mx.ones((128, 128), dtype=mx.int8)), r"dense\.weight is I8 with weight_scale_inv in F32"),
        ("fp8", fp8(weight=mx.ones((128, 128), dtype=mx.bfloat16)), r"dense\.weight is BF16 with weight_scale_inv"),
        ("fp8", fp8(weight_scale_inv=int32(2, 2)), r"with weight_scale_inv in I32"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(tmp_path, kind, parts, match):
    with_dense(tmp_path / "in", CONFIGS[kind], parts)
    with pytest.raises(WeightsError, match=match):
        convert(tmp_path / "in", tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


def test_integers_with_a_scale_a_row_are_refused(tmp_path):
    parts = {"weight": mx.ones((128, 128), dtype=mx.int8), "weight_scale": mx.ones((128, 1))}
    with_dense(tmp_path / "in", {"quant_method": "compressed-tensors", "format": "int-quantized"}, lambda w: parts)
    with pytest.raises(WeightsError, match=r"dense\.weight is I8 with weight_scale in F32"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        *(
            ("fp8", {"weight_block_size": v}, fp8())
            for v in ([0, 0], [-96, -96], "abc", [96], 96, {"a": 1}, [None] * 2)
        ),
        *(("gptq", {"bits": v}, gptq()) for v in (0, -4, "x", None, [4])),
        *(("compressed", {"config_groups": v}, asymmetric()) for v in ([1], "x", {"g": 1})),
        *(("compressed", {"config_groups": {"g": {"weights": {"num_bits": v}}}}, asymmetric()) for v in ("x", 0, [4])),
    ],
)
def test_quantizations_that_cannot_be_understood_are_one_line(tmp_path, capsys, kind, changes, parts):
    with_dense(tmp_path / "in", CONFIGS[kind] | changes, parts)
    assert main(["convert", "--model", str(tmp_path / "in"), "--mlx-path", str(tmp_path / "out"), "-d"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ring-mlx: [")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "x"},
        {"quantization": [1]},
        *(
            {"quantization": {"bits": 8, "group_size": 64, "lm_head": v}}
            for v in (
                {"bits": 8},
                {"bits": 0, "group_size": 0},
                {"bits": "x", "group_size": 64},
                {"bits": 4, "group_size": 64, "mode": "odd"},
                {"bits": 8, "group_size": 32, "mode": "mxfp8"},
            )
        ),
        {"torch_dtype": ["x"]},
    ],
)
def test_settings_of_our_own_form_that_cannot_be_understood_are_one_line(tmp_path, capsys, changes):
    shutil.copytree(demo_model_path(), tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw | changes))
    assert main(["convert", "--model", str(tmp_path / "in"), "--mlx-path", str(tmp_path / "out"), "-d"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ring-mlx: [")
    assert not (tmp_path / "out").exists()


def reads_of(tree, keys):
    """Whether code looks one of the keys up, with ``get`` or in brackets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            found = node.args[:1]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            found = [node.slice]
        else:
            continue
        if any(isinstance(key, ast.Constant) and key.value in keys for key in found):
            return True
    return False


def test_quantization_settings_are_read_in_one_module():
    keys = {"quantization", "quantization_config", "quant_method", "config_groups", "weight_block_size", "desc_act"}
    package = Path(ring_mlx.__file__).parent
    readers = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if reads_of(ast.parse(path.read_text()), keys)
    }
    assert readers == {"model/quantization.py"}
