"""Forms of single matrices that no file of tests/foreign_files has, and the names of those that are not read."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx import load_model
from ring_mlx.checkpoint.summary import summary_of
from ring_mlx.convert import conversion, convert
from ring_mlx.errors import OptionError, RingError, WeightsError
from tests import foreign
from tests.compare import assert_close
from tests.tiny import config, save_hf, write

DENSE = "model.layers.0.attention.dense"
EXPERT = "model.layers.1.mlp.experts.{}.up_proj"
SHAPE = foreign.shape(num_hidden_layers=2, hidden_size=192, num_experts=2, n_group=1)
RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK_WEIGHTS", 5000)


def checkpoint(folder, parts, quantization=None, name=DENSE, shape=SHAPE, **more):
    """A float checkpoint in which one module's weight comes as ``parts``; returns its float tensors."""
    floats = foreign.float_weights(shape)
    tensors = {n: a for n, a in floats.items() if n != f"{name}.weight"}
    tensors |= {f"{name}.{suffix}": a for suffix, a in parts.items()} | more
    foreign.write(folder, shape | ({} if quantization is None else {"quantization_config": quantization}), tensors)
    return floats


def read_back(folder, name=DENSE, **options):
    out = convert(folder, folder.parent / "out", **options)
    return mx.load(str(out / "model.safetensors"))[f"{name}.weight"]


def grid(rows, cols, group, bits):
    """Random codes, scales and zero points, and what they mean, in groups of which the last may be short."""
    groups = np.arange(cols) // group
    codes, count = RNG.integers(0, 1 << bits, (rows, cols)), groups[-1] + 1
    scales = RNG.uniform(0.01, 0.02, (rows, count)).astype(np.float16).astype(np.float64)
    zeros = RNG.integers(0, 1 << bits, (rows, count))
    return codes, scales, zeros, (scales[:, groups] * (codes - zeros[:, groups])).astype(np.float32)


def as_gptq(codes, scales, zeros, bits):
    return {
        "qweight": mx.contiguous(foreign.words(codes, bits).T),
        "qzeros": foreign.words(zeros.T, bits),
        "scales": mx.array(scales.T.astype(np.float16)),
    }


def test_the_last_group_of_gptq_may_be_short(tmp_path):
    codes, scales, zeros, meant = grid(192, 128, 96, 4)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 96, "checkpoint_format": "gptq_v2"}
    checkpoint(tmp_path / "in", as_gptq(codes, scales, zeros, 4), quantization)
    assert_close(read_back(tmp_path / "in", dequantize=True), meant, 1e-6)
    # 32 divides 96 and 128, so MLX holds it.
    kept = convert(tmp_path / "in", tmp_path / "kept")
    assert json.loads((kept / "config.json").read_text())["quantization"]["group_size"] == 32
    arrays = mx.load(str(kept / "model.safetensors"))
    packed = (arrays[f"{DENSE}.{part}"] for part in ("weight", "scales", "biases"))
    assert_close(mx.dequantize(*packed, 32, 4), meant, 1e-6)


def test_modules_of_gptq_may_have_bits_of_their_own(tmp_path):
    codes, scales, zeros, meant = grid(192, 128, 64, 8)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "format": "gptq_v2"}
    quantization["dynamic"] = {"+:.*dense": {"bits": 8, "group_size": 64}}
    checkpoint(tmp_path / "in", as_gptq(codes, scales, zeros, 8), quantization)
    assert_close(read_back(tmp_path / "in", dequantize=True), meant, 1e-6)


def test_the_order_of_columns_counts_whatever_config_says(tmp_path):
    codes, scales, zeros, meant = grid(192, 128, 64, 4)
    order = np.arange(127, -1, -1) // 64
    meant = (scales[:, order] * (codes - zeros[:, order])).astype(np.float32)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}
    parts = as_gptq(codes, scales, zeros, 4) | {"g_idx": mx.array(order.astype(np.int32))}
    checkpoint(tmp_path / "in", parts, quantization)
    assert_close(read_back(tmp_path / "in", dequantize=True), meant, 1e-6)


def whole_words(codes, bits):
    """As older versions of compressed-tensors pack: whole codes in each word."""
    each = 32 // bits
    padded = np.pad(codes, [(0, 0), (0, -codes.shape[1] % each)]).reshape(len(codes), -1, each).astype(np.uint64)
    words = (padded << (bits * np.arange(each, dtype=np.uint64))).sum(-1)
    return mx.array(words.astype(np.uint32)).view(mx.int32)


@pytest.mark.parametrize("kind", ["old words", "plain zero points", "one scale for all"])
def test_other_forms_of_compressed_tensors(tmp_path, kind):
    codes, scales, zeros, meant = grid(192, 128, 64, 3)
    parts = {"weight_packed": whole_words(codes, 3), "weight_zero_point": mx.contiguous(whole_words(zeros.T, 3).T)}
    if kind == "plain zero points":
        parts["weight_zero_point"] = mx.array((zeros - 4).astype(np.int8))
    if kind == "one scale for all":
        scales, meant = np.array([[0.01]]), np.float32(0.01) * (codes - 4).astype(np.float32)
        parts = {"weight_packed": foreign.words(codes, 3)}
    parts["weight_scale"] = mx.array(
        scales.astype(np.float32).reshape(-1) if scales.size == 1 else scales.astype(np.float32)
    )
    groups = {"g": {"weights": {"num_bits": 8}}, "h": {"weights": {"num_bits": 3}}}
    checkpoint(tmp_path / "in", parts, {"quant_method": "compressed-tensors", "config_groups": groups})
    assert_close(read_back(tmp_path / "in", dequantize=True), meant, 1e-6)


@pytest.mark.parametrize("shape", [(192, 4), (1, 1), (), (6, 4)])
@pytest.mark.parametrize("exponents", [False, True])
def test_float8_with_scales_of_any_shape(tmp_path, shape, exponents):
    stored = RNG.integers(110, 125, shape, dtype=np.uint8) if exponents else RNG.uniform(0.01, 0.02, shape)
    scales = 2.0 ** (np.array(stored, np.float64) - 127) if exponents else np.array(stored)
    codes = mx.to_fp8(mx.random.normal((192, 128), key=mx.random.key(1)))
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    quantization["config_groups"] = {"g": {"weights": {"block_structure": "32x32"}}}
    scale = mx.array(np.array(stored, np.uint8 if exponents else np.float32))
    checkpoint(tmp_path / "in", {"weight": codes, "weight_scale": scale}, quantization)
    spread = scales if scales.size == 1 else np.kron(scales, np.ones((192 // shape[0], 128 // shape[1])))
    meant = np.array(mx.from_fp8(codes, mx.float32), np.float64) * spread
    assert_close(read_back(tmp_path / "in"), meant.astype(np.float32), 1e-6)


def test_one_expert_may_be_of_another_type_or_form(tmp_path):
    name = EXPERT.format(1)
    floats = checkpoint(tmp_path / "in", {}, name=name)
    weight = floats[f"{name}.weight"].astype(mx.float16)
    checkpoint(tmp_path / "in", {"weight": weight}, name=name)
    up = read_back(tmp_path / "in", "model.layers.1.mlp.switch_mlp.up_proj")
    assert up.dtype == mx.float32
    assert mx.array_equal(up[1], weight.astype(mx.float32))
    assert mx.array_equal(up[0], floats[f"{EXPERT.format(0)}.weight"])
    (tmp_path / "b").mkdir()
    name = EXPERT.format(0)
    parts, meant = foreign.compressed(floats[f"{name}.weight"], 64, True)
    checkpoint(tmp_path / "b" / "in", parts, {"quant_method": "compressed-tensors"}, name=name)
    with pytest.raises(OptionError, match="add -q to requantize or -d"):
        convert(tmp_path / "b" / "in", tmp_path / "b" / "out")
    up = read_back(tmp_path / "b" / "in", "model.layers.1.mlp.switch_mlp.up_proj", dequantize=True)
    assert_close(up[0], meant.astype(np.float32), 1e-6)
    assert mx.array_equal(up[1], floats[f"{EXPERT.format(1)}.weight"])


def test_what_is_left_out_cannot_block_the_rest(tmp_path):
    save_hf(tmp_path / "in", config())
    tensors = mx.load(str(tmp_path / "in" / "model.safetensors"))
    extra = {
        "model.mtp.layers.0.weight": mx.array([True]),
        "model.layers.9.mlp.gate.weight": mx.ones((2, 2), dtype=mx.complex64),
        "model.layers.0.attention.dense.input_zero_point": mx.array([1], dtype=mx.int16),
        "model.layers.1.mlp.experts.3.up_proj.input_global_scale": mx.array([1.0]),
    }
    write(tmp_path / "in", config(), tensors | extra)
    assert convert(tmp_path / "in", tmp_path / "out").is_dir()
    write(tmp_path / "in", config(), tensors | {"model.norm.weight": mx.ones((48,), dtype=mx.complex64)})
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has dtype C64, which cannot be converted"):
        convert(tmp_path / "in", tmp_path / "other")


BYTES = mx.zeros((8, 8), dtype=mx.uint8)


@pytest.mark.parametrize(
    ("quantization", "parts", "match"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            {"weight": BYTES.reshape(-1, 1), "weight.absmax": mx.ones((4,))},
            r"'bitsandbytes \(nf4\)' is not supported; .* or save it after transformers' model.dequantize\(\)",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": BYTES}, r"'bitsandbytes \(int8\)'"),
        (None, {"weight": BYTES.view(mx.int8), "SCB": mx.ones((8,))}, "the weights are in bitsandbytes int8"),
        (None, {"weight": BYTES, "weight.absmax": mx.ones((8,))}, "the weights are in bitsandbytes nf4 or fp4"),
        *(
            (
                {"quant_method": method},
                {"weight": BYTES},
                f"quantization method '{method}' is not supported; use its bf",
            )
            for method in ("exl2", "hqq", "torchao", "quanto", "aqlm", "eetq", "bitnet", "auto-round")
        ),
        (None, {"trellis": BYTES, "suh": mx.ones((8,))}, "the weights are in EXL3"),
        (None, {"W_q": BYTES}, "the weights are in HQQ"),
        (None, {"_weight_qdata": BYTES.view(mx.int8)}, "the weights are in torchao"),
        (
            None,
            {"weight": mx.ones((192, 128), dtype=mx.int8), "weight_scale": mx.ones((192, 1))},
            "int-quantized, W8A8",
        ),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            as_gptq(*grid(192, 128, 64, 4)[:3], 4),
            "'marlin' is not",
        ),
        ({"quant_method": "gptq", "bits": 5}, as_gptq(*grid(192, 128, 64, 4)[:3], 4), "has 5 bits in"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            {"weight": mx.zeros((192, 128))},
            "the weights are rotated",
        ),
    ],
)
def test_forms_that_are_not_read_are_named_with_a_remedy(tmp_path, quantization, parts, match):
    checkpoint(tmp_path / "in", parts, quantization)
    with pytest.raises(WeightsError, match=match) as e:
        convert(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(e.value)
    if quantization and quantization["quant_method"] not in ("gptq", "compressed-tensors"):
        with pytest.raises(WeightsError, match="is not supported; use its bfloat16"):
            load_model(tmp_path / "in")
        assert summary_of(tmp_path / "in").trouble.endswith("not supported")


def test_a_method_that_is_only_left_over_does_not_matter(tmp_path):
    floats = foreign.float_weights(SHAPE)
    checkpoint(tmp_path / "in", {"weight": floats[f"{DENSE}.weight"]}, {"quant_method": "bitsandbytes"})
    assert mx.array_equal(read_back(tmp_path / "in"), floats[f"{DENSE}.weight"])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "pytorch_model-00001-of-00002.bin",
            r"only pickled weights, .*'pytorch_model-00001-of-00002.bin'.*save_pretrained",
        ),
        ("consolidated.00.pth", "only pickled weights"),
        ("model-Q4_K_M.gguf", "only GGUF"),
        ("weights.npz", "the form of MLX before safetensors"),
    ],
)
def test_files_that_are_no_safetensors_are_named(tmp_path, name, match):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / name).write_bytes(b"x")
    for read in (load_model, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(RingError, match=f"no .safetensors file in .*{match}"):
            read(tmp_path)
