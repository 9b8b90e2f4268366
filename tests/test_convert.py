"""Conversion: ours loads what ours and mlx-lm's write, and mlx-lm loads ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.bailing_moe_linear as stock
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

from ring_mlx import load_model
from ring_mlx.convert import convert, describe
from ring_mlx.decay import decay_rate
from ring_mlx.errors import OptionError
from tests.compare import assert_close, relative_rms
from tests.tiny import GOLDENS, config, save_hf, tokens

GOLDEN = GOLDENS / "mini_like"
ROOT = Path(__file__).parent.parent


def test_plain_conversion_changes_nothing(tmp_path):
    out = convert(GOLDEN, tmp_path / "out")
    x = tokens(40, vocab=128)
    assert_close(load_model(out)(x), load_model(GOLDEN)(x), 1e-6)
    names = mx.load(str(out / "model.safetensors"))
    assert "model.layers.1.mlp.switch_mlp.up_proj.weight" in names
    assert names["model.layers.1.mlp.gate.gate_proj.weight"].dtype == mx.bfloat16
    assert "not quantised" in describe(out)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_conversion(tmp_path, bits):
    out = convert(GOLDEN, tmp_path / "out", quantize=True, bits=bits, group_size=32)
    model = load_model(out)
    assert type(model.layers[1].mlp.switch_mlp.up_proj).__name__ == "QuantizedSwitchLinear"
    assert type(model.layers[1].mlp.gate.gate_proj).__name__ == "Linear"
    weight = load_model(GOLDEN).layers[0].attention.dense.weight
    quantised = model.layers[0].attention.dense
    back = mx.dequantize(quantised.weight, quantised.scales, quantised.biases, 32, bits)
    assert relative_rms(back, weight) < {8: 0.01, 4: 0.15}[bits]


def test_mlx_lm_with_its_decay_corrected_computes_the_same_from_our_conversion(tmp_path, monkeypatch):
    def right_slopes(self):
        return -decay_rate(self.num_attention_heads, self.layer_idx, self.num_hidden_layers)

    monkeypatch.setattr(stock.LinearAttention, "_get_slopes", right_slopes)
    save_hf(tmp_path / "hf", config(head_dim=8))
    out = convert(tmp_path / "hf", tmp_path / "out", quantize=True, bits=8, group_size=32)
    theirs, _ = mlx_lm_load_model(out)
    x = tokens(40)
    assert_close(load_model(out)(x), theirs(x), 1e-4)


def test_we_load_what_mlx_lm_converts(tmp_path, monkeypatch):
    import mlx_lm.utils

    monkeypatch.setattr(mlx_lm.utils, "load_tokenizer", lambda *a, **k: None)
    source = tmp_path / "hf"
    save_hf(
        source, config(num_attention_heads=8, head_dim=8, hidden_size=64, moe_intermediate_size=64, group_norm_size=2)
    )
    model, raw = mlx_lm_load_model(source)
    model, raw = mlx_lm.utils.quantize_model(model, raw, 32, 8)
    mlx_lm.utils.save_model(tmp_path / "theirs", model)
    mlx_lm.utils.save_config(raw, tmp_path / "theirs" / "config.json")
    ours = load_model(tmp_path / "theirs")
    assert ours.layers[1].mlp.gate.gate_proj.bits == 8
    assert relative_rms(ours(tokens(30)), load_model(source)(tokens(30))) < 0.3


def test_a_target_that_exists_is_refused(tmp_path):
    with pytest.raises(OptionError, match="exists already"):
        convert(GOLDEN, tmp_path)


def test_a_quantised_source_is_refused(tmp_path):
    out = convert(GOLDEN, tmp_path / "out", quantize=True, bits=8, group_size=32)
    with pytest.raises(OptionError, match="quantised already"):
        convert(out, tmp_path / "again", quantize=True)


def test_nothing_is_left_of_a_failed_conversion(tmp_path, monkeypatch):
    import ring_mlx.convert as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_config", full)
    with pytest.raises(Exception, match="No space left"):
        convert(GOLDEN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_door_and_the_command(tmp_path):
    for i, command in enumerate(
        ([sys.executable, str(ROOT / "convert.py")], [sys.executable, "-m", "ring_mlx", "convert"])
    ):
        out = tmp_path / str(i)
        result = subprocess.run(
            [*command, "--hf-path", str(GOLDEN), "--mlx-path", str(out), "-q", "--q-bits", "8", "--q-group-size", "32"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "8-bit affine" in result.stdout
        assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8
