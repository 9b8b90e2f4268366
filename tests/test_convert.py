"""Conversion: ours loads what ours and mlx-lm's write, mlx-lm loads ours, and what is in the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.bailing_moe_linear as stock
import pytest
from mlx_lm import convert as mlx_lm_convert
from mlx_lm.utils import load_model as mlx_lm_load_model

from ring_mlx import demo_model_path, load_model
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.cli import main
from ring_mlx.convert import conversion, convert, describe
from ring_mlx.errors import ConvertError, OptionError, WeightsError
from ring_mlx.model.decay import decay_rate
from tests.compare import assert_close, relative_rms
from tests.tiny import GOLDENS, config, save_hf, tokens, write

GOLDEN = GOLDENS / "mini_like"
ROOT = Path(__file__).parent.parent


def test_plain_conversion_changes_nothing(tmp_path):
    out = convert(GOLDEN, tmp_path / "out")
    x = tokens(40, vocab=128)
    assert_close(load_model(out)(x), load_model(GOLDEN)(x), 1e-6)
    names = mx.load(str(out / "model.safetensors"))
    assert "model.layers.1.mlp.switch_mlp.up_proj.weight" in names
    assert names["model.layers.1.mlp.gate.gate_proj.weight"].dtype == mx.bfloat16
    assert "not quantized" in describe(out)
    assert "quantization" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("fit", ["rtn", "fast", "best"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_conversion(tmp_path, bits, fit):
    out = convert(GOLDEN, tmp_path / "out", quantize=True, bits=bits, group_size=32, fit=fit)
    model = load_model(out)
    assert type(model.layers[1].mlp.switch_mlp.up_proj).__name__ == "QuantizedSwitchLinear"
    assert type(model.layers[1].mlp.gate.gate_proj).__name__ == "Linear"
    weight = load_model(GOLDEN).layers[0].attention.dense.weight
    quantized = model.layers[0].attention.dense
    back = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, 32, bits)
    assert relative_rms(back, weight) < {8: 0.01, 4: 0.15}[bits]
    rounded = mx.quantize(weight.astype(mx.bfloat16), 32, bits)
    same = mx.array_equal(mx.array(quantized.weight), rounded[0])
    assert bool(same) == (fit == "rtn")


@pytest.fixture
def stock_with_the_right_decay(monkeypatch):
    def right_slopes(self):
        return -decay_rate(self.num_attention_heads, self.layer_idx, self.num_hidden_layers)

    monkeypatch.setattr(stock.LinearAttention, "_get_slopes", right_slopes)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4},
        {"bits": 3},
        {"recipe": "mixed_3_6"},
        {"recipe": "ring-q4"},
        {"bits": 4, "overrides": ["mlp.gate.gate_proj=8", "layers.1.attention=none"]},
    ],
)
def test_mlx_lm_with_its_decay_corrected_computes_the_same(tmp_path, stock_with_the_right_decay, options):
    # As the goldens are built, but with head_dim = hidden / heads, which mlx-lm takes for granted.
    save_hf(tmp_path / "hf", config(num_attention_heads=4, head_dim=16, hidden_size=64, group_norm_size=2))
    out = convert(tmp_path / "hf", tmp_path / "out", quantize=True, **{"group_size": 32} | options)
    theirs, _ = mlx_lm_load_model(out)
    assert_close(load_model(out)(tokens(40)), theirs(tokens(40)), 1e-4)


@pytest.mark.parametrize("name", ["mini_like", "flash_like"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_each_golden_quantized_is_the_model_of_its_stored_weights(tmp_path, name, bits):
    """Stock mlx-lm cannot load the goldens at any width (head_dim is not hidden / heads); the plain model is the reference."""
    out = convert(GOLDENS / name, tmp_path / "out", quantize=True, bits=bits, group_size=32)
    plain = convert(out, tmp_path / "plain", dequantize=True, dtype=mx.float32)
    model, exact = load_model(out, dtype=mx.float32), load_model(plain, dtype=mx.float32)
    assert model.layers[1].mlp.switch_mlp.up_proj.bits == bits
    assert_close(model(tokens(30)), exact(tokens(30)), 1e-4)


def test_the_demo_model_in_four_bits_computes_the_same_in_mlx_lm(tmp_path, stock_with_the_right_decay):
    out = convert(demo_model_path(), tmp_path / "out", quantize=True, bits=4, dtype=mx.float32, fit="rtn")
    theirs, _ = mlx_lm_load_model(out)
    x = tokens(24, vocab=1024)
    ours = load_model(out)
    assert ours.layers[3].mlp.switch_mlp.down_proj.bits == 4
    assert_close(ours(x), theirs(x), 1e-4)
    assert load_tokenizer(out).get_vocab() == load_tokenizer(demo_model_path()).get_vocab()


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
def test_we_load_what_mlx_lm_converts(tmp_path):
    float_model = convert(demo_model_path(), tmp_path / "float", dequantize=True)
    mlx_lm_convert(str(float_model), str(tmp_path / "theirs"), quantize=True, q_bits=8)
    ours = load_model(tmp_path / "theirs")
    assert ours.layers[1].mlp.gate.gate_proj.bits == 8
    x = tokens(12, vocab=1024)
    assert relative_rms(ours(x), load_model(float_model)(x)) < 0.15
    # And it is a source like any other: kept as it is, or requantized.
    again = convert(tmp_path / "theirs", tmp_path / "again")
    assert_close(load_model(again)(x), ours(x), 1e-6)


def test_settings_by_module_stand_in_config(tmp_path):
    save_hf(tmp_path / "hf", config(hidden_size=64, moe_intermediate_size=40))
    overrides = ["lm_head=8", "layers.2.*dense=none"]
    out = convert(tmp_path / "hf", tmp_path / "out", quantize=True, bits=3, group_size=32, overrides=overrides)
    raw = json.loads((out / "config.json").read_text())
    quantization = raw["quantization"]
    assert raw["quantization_config"] == quantization
    assert {k: quantization[k] for k in ("bits", "group_size", "mode")} == {
        "bits": 3,
        "group_size": 32,
        "mode": "affine",
    }
    assert quantization["lm_head"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert quantization["model.layers.2.attention.dense"] is False
    assert quantization["model.layers.1.mlp.gate.gate_proj"] is False
    assert quantization["model.layers.1.mlp.switch_mlp.down_proj"] is False, "40 columns do not divide into groups"
    assert "model.layers.1.mlp.switch_mlp.up_proj" not in quantization
    assert load_model(out)(tokens(5)).shape == (1, 5, 70)


def test_shards_and_index(tmp_path):
    out = convert(GOLDEN, tmp_path / "out", shard_bytes=200_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 3
    for name in shards:
        arrays = mx.load(str(out / name))
        assert {n for n, s in index["weight_map"].items() if s == name} == set(arrays)
    assert index["metadata"]["total_parameters"] == 917_000
    x = tokens(10, vocab=128)
    assert_close(load_model(out)(x), load_model(GOLDEN)(x), 1e-6)


def test_tokenizer_template_and_card_come_along(tmp_path):
    out = convert(demo_model_path(), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (demo_model_path() / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "library_name: mlx" in card
    assert "Converted from demo_model by ring-mlx" in card
    assert "| routed experts | 4,128,768 | 8.50 |" in card
    assert str(demo_model_path()) not in card + (out / "conversion.json").read_text()


def test_a_dtype_for_what_is_not_quantized(tmp_path):
    out = convert(GOLDEN, tmp_path / "out", dtype=mx.float16)
    arrays = mx.load(str(out / "model.safetensors"))
    kinds = {n.rpartition(".")[2]: a.dtype for n, a in arrays.items() if ".mlp.gate." in n}
    assert kinds == {"weight": mx.bfloat16, "expert_bias": mx.float32}, "the router keeps the source's precision"
    assert arrays["model.norm.weight"].dtype == mx.float16
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_target_that_exists_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="exists already"):
        convert(GOLDEN, tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": True, "dequantize": True}, "-q and -d contradict"),
        ({"recipe": "ring-q4"}, "--quant-predicate needs --quantize"),
        ({"overrides": ["a=4"]}, "--q-override needs --quantize"),
        ({"mode": "nvfp4"}, "--q-mode nvfp4 needs --quantize"),
        ({"quantize": True, "bits": 7}, "7 bits in groups of 64 is not possible"),
        ({"quantize": True, "group_size": 48}, "4 bits in groups of 48 is not possible"),
        ({"quantize": True, "mode": "mxfp4", "bits": 8}, "mxfp4 has 4 bits in groups of 32, not 8 in 32"),
        ({"quantize": True, "recipe": "mixed_1_2"}, "--quant-predicate 'mixed_1_2' is not one of"),
        ({"quantize": True, "mode": "mxfp4", "recipe": "ring-q4"}, "is for affine quantization, not mxfp4"),
        ({"quantize": True, "overrides": ["attention"]}, "--q-override 'attention' is not 'pattern=bits'"),
        ({"quantize": True, "overrides": ["=4"]}, "--q-override '=4' is not"),
        ({"quantize": True, "overrides": ["atention=8"]}, "--q-override 'atention=8' matches no module"),
        ({"quantize": True, "overrides": ["gate.gate_proj=4"]}, "would harm the router"),
        ({"quantize": True, "fit": "search"}, "--q-fit 'search' is not one of"),
        ({"bits": 4}, "--q-bits needs --quantize"),
        ({"group_size": 32}, "--q-group-size needs --quantize"),
        ({"quantize": True, "bits": 4, "recipe": "ring-q4"}, "--q-bits 4 has no effect on --quant-predicate ring-q4"),
    ],
)
def test_options_that_cannot_work_are_refused_and_leave_nothing(tmp_path, options, match):
    with pytest.raises(OptionError, match=match) as e:
        convert(GOLDEN, tmp_path / "out", **options)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK_WEIGHTS", 1 << 15)
    peaks = []
    for experts in (8, 64):
        raw = config(hidden_size=128, moe_intermediate_size=64, num_experts=experts, num_hidden_layers=3)
        save_hf(tmp_path / f"hf{experts}", raw)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(tmp_path / f"hf{experts}", tmp_path / f"out{experts}", quantize=True)
        peaks.append(mx.get_peak_memory() - before)
    largest = 64 * 64 * 128 * 4
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < largest * 1.5, "the larger stack itself takes 2 MB"


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def test_damaged_sources_are_one_line_and_exit_code_2(tmp_path):
    first = "model-00001-of-00003.safetensors"
    cases = {
        "cut": (first, lambda b: b[:-10], "is truncated or damaged"),
        "header": (first, lambda b: b"\xff" * 100, "is truncated or damaged"),
        "empty": (first, lambda b: b"", "is truncated or damaged"),
        "config": ("config.json", lambda b: b"{", "is not valid JSON"),
        "index": ("model.safetensors.index.json", lambda b: b"{}", "has no weight_map"),
        "type": ("config.json", lambda b: b.replace(b"bailing_moe_linear", b"llama"), "model_type 'llama'"),
        "size": ("config.json", lambda b: b.replace(b'"hidden_size": 48', b'"hidden_size": 96'), "does not match"),
    }
    script = ["import sys", "from ring_mlx.cli import main"]
    for case, (name, change, _) in cases.items():
        save_hf(tmp_path / case, config(), shards=3)
        damage(tmp_path / case, name, change)
        script.append(f"print(main(['convert', '--model', {case!r}, '--mlx-path', 'out', '-q']))")
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.stdout.split() == ["2"] * len(cases), result.stderr
    for line, (_, _, match) in zip(result.stderr.splitlines(), cases.values(), strict=True):
        assert match in line
        assert line.startswith("ring-mlx: [")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_values_that_are_not_finite_and_missing_experts_are_named(tmp_path):
    save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    good = tensors.pop(name)
    write(tmp_path, config(), tensors)
    with pytest.raises(WeightsError, match="should stack experts 0 to 11, but lacks 7"):
        convert(tmp_path, tmp_path / "out")
    bad = mx.concatenate([good[:, :-1], mx.full((good.shape[0], 1), float("nan"))], axis=1)
    write(tmp_path, config(), tensors | {name: bad})
    for options in ({}, {"quantize": True, "group_size": 32}):
        with pytest.raises(
            WeightsError, match=r"layers\.3\.mlp\.switch_mlp\.up_proj\.weight holds values that are not"
        ):
            convert(tmp_path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    write(tmp_path, config(), tensors | {name: good[:-1]})
    with pytest.raises(WeightsError, match="differ in shape"):
        convert(tmp_path, tmp_path / "out")


def test_the_door_and_the_command(tmp_path):
    for i, command in enumerate(
        ([sys.executable, str(ROOT / "convert.py")], [sys.executable, "-m", "ring_mlx", "convert"])
    ):
        out = tmp_path / str(i)
        result = subprocess.run(
            [
                *command,
                "--hf-path",
                str(GOLDEN),
                "--mlx-path",
                str(out),
                "-q",
                "--q-bits",
                "8",
                "--q-group-size",
                "32",
                "--q-fit",
                "rtn",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        line, then = result.stderr.splitlines()
        assert line.startswith("ring-mlx: the decay was not checked: [tokenizer] no tokenizer")
        assert then.startswith("ring-mlx: the result can be: ring-mlx doctor --check-decay")
        assert "8-bit affine" in result.stdout
        assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ring_mlx.convert.conversion.encode", interrupted)
    assert main(["convert", "--model", str(GOLDEN), "--mlx-path", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "ring-mlx: interrupted; run again with --resume to go on.\n"
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    assert main(["convert", "--model", str(GOLDEN), "--mlx-path", str(tmp_path / "out"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "--hf-path (or --model) is missing"),
        (["--dry-run"], "--hf-path (or --model) is missing"),
        (["--verify", "--report"], "--report and --dry-run need the source"),
        (["--verify", "--mlx-path", "/nowhere"], "no conversion.json in /nowhere"),
        (["--model", str(GOLDEN), "--upload-repo", "x"], "--upload-repo 'x' is not owner/name"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", str(GOLDEN), "--q-fit", "rtn"], "--q-fit needs --quantize"),
        (["--model", str(GOLDEN), "--mlx-path", "/tmp/" + "n" * 256], "cannot be a folder (File name too long)"),
        (["--model", str(GOLDEN), "--mlx-path", "/tmp/" + "n" * 250], "cannot be a folder (File name too long)"),
    ],
)
def test_what_the_command_refuses(args, match, capsys):
    assert main(["convert", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line


def test_the_report_is_read_before_anything_is_converted(tmp_path, capsys):
    args = ["convert", "--model", str(GOLDEN), "--mlx-path", str(tmp_path / "out")]
    assert main([*args, "--report", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
