"""What a conversion rounds, casts or leaves in float is kept where it matters, and said where it is not."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from ring_mlx import demo_model_path
from ring_mlx.cli import main
from ring_mlx.convert import convert, convert_plan, describe, report
from ring_mlx.convert.conversion import size_table
from ring_mlx.convert.options import Options
from ring_mlx.convert.writer import PartialFolder, read_manifest
from tests import foreign
from tests.tiny import config, save_hf

DENSE = "model.layers.0.attention.dense"
KEPT = ("norm", "lm_head", "mlp.gate.", "expert_bias")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 checkpoint whose config.json says bfloat16."""
    folder = tmp_path_factory.mktemp("wide") / "hf"
    save_hf(folder, config(torch_dtype="float32"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    return folder


def test_norms_router_and_head_keep_what_the_file_holds(wide, tmp_path):
    said = []
    arrays = mx.load(str(convert(wide, tmp_path / "out", say=said.append) / "model.safetensors"))
    source = mx.load(str(wide / "model.safetensors"))
    for name, value in arrays.items():
        is_kept = any(part in name for part in KEPT)
        assert value.dtype == (mx.float32 if is_kept else mx.bfloat16), name
        if is_kept:
            assert mx.array_equal(value, source[name.replace(".gate.gate_proj.", ".gate.")])
    (line,) = said
    cast = sum(a.dtype == mx.bfloat16 for a in arrays.values())
    assert line.startswith(f"cast to a narrower float: {cast} from float32 to bfloat16 (model.word_embeddings.weight, ")
    assert f"- {line}" in (tmp_path / "out" / "README.md").read_text()
    assert line in size_table(*convert_plan(wide, Options()))


def test_a_dtype_that_is_asked_for_is_for_all_but_the_router(wide, tmp_path):
    said = []
    out = convert(wide, tmp_path / "out", dtype=mx.bfloat16, say=said.append)
    arrays = mx.load(str(out / "model.safetensors"))
    wider = {n for n, a in arrays.items() if a.dtype == mx.float32}
    assert wider
    assert all(".mlp.gate." in n for n in wider)
    assert "model.norm.weight" not in wider
    assert f"{len(arrays) - len(wider)} from float32 to bfloat16" in said[0]
    said = []
    convert(wide, tmp_path / "all", dtype=mx.float32, say=said.append)
    assert said == []


def test_scales_in_float32_are_copied_as_they_are(wide, tmp_path):
    first = convert(wide, tmp_path / "first", quantize=True, group_size=32, dtype=mx.float32, fit="rtn")
    raw = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    before, after = (
        mx.load(str(f / "model.safetensors")) for f in (first, convert(first, tmp_path / "copy", say=lambda line: None))
    )
    scales = [n for n in before if n.endswith((".scales", ".biases"))]
    assert scales
    assert all(mx.array_equal(after[n], before[n]) and after[n].dtype == mx.float32 for n in scales)


def test_when_most_weights_cannot_be_quantized_it_is_said_first_and_last(tmp_path):
    save_hf(tmp_path / "hf", config(hidden_size=96))
    said = []
    convert(
        tmp_path / "hf",
        tmp_path / "out",
        quantize=True,
        fit="rtn",
        say=said.append,
        progress=lambda *a: said.append("...") if said[-1] != "..." else None,
    )
    first, between, last = said
    assert (first, between) == (last, "...")
    assert first.startswith("100% of the weights that were to be quantized stay in float; left in float, as their rows")
    assert "32 would divide" in first
    assert "of them (--q-group-size 32)" in first
    assert "32 would divide" in size_table(*convert_plan(tmp_path / "hf", Options(quantize=True)))


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """A GPTQ checkpoint with zero points, float16 scales and a bfloat16 model; its exact scales and biases of one."""
    folder, raw = tmp_path_factory.mktemp("gptq") / "in", foreign.shape(torch_dtype="bfloat16", vocab_size=1024)
    tensors = {}
    for name, value in foreign.float_weights(raw).items():
        if foreign.is_packed(name):
            parts = foreign.gptq(value, 64, None)[0]
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": a for suffix, a in parts.items()}
        else:
            tensors[name] = value if name.endswith("expert_bias") else value.astype(mx.bfloat16)
    foreign.write(folder, raw | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo_model_path() / name).read_bytes())
    exact = convert(folder, folder.parent / "exact", dtype=mx.float32)
    return folder, mx.load(str(exact / "model.safetensors"))


def steps_off(arrays, exact):
    """The most that a weight moved, in steps, over every code of every group."""
    worst = 0.0
    for name in (n.removesuffix(".scales") for n in exact if n.endswith(".scales")):
        s, b, t, c = (
            np.array(a[f"{name}.{part}"].astype(mx.float32), dtype=np.float64)[..., None]
            for a in (exact, arrays)
            for part in ("scales", "biases")
        )
        q = np.arange(16)
        worst = max(worst, float((np.abs((t * q + c) - (s * q + b)) / s).max()))
    return worst


@pytest.mark.parametrize("dtype", [None, mx.float16])
def test_the_rounding_of_a_grid_is_measured_and_said(integers, tmp_path, dtype):
    folder, exact = integers
    said = []
    out = convert(folder, tmp_path / "out", dtype=dtype, say=said.append)
    found = steps_off(mx.load(str(out / "model.safetensors")), exact)
    assert found > (0.03 if dtype is None else 0.001)
    assert max(read_manifest(out)["grid_steps"].values()) == pytest.approx(found, rel=1e-3)
    note = f"weights within {found:.2g} of a step of the source's integers"
    assert note in describe(out)
    assert f"- {note}\n" in (out / "README.md").read_text()
    assert ("comes closer at the same size" in said[-1]) == (dtype is None)
    assert "--dtype float32 keeps them too (0.00" in said[-1]
    rows = [{"text": "one two three four"}]
    measured = report.compare(folder, out, rows)
    assert report.table(measured).endswith(note)
    report.save(measured, out)
    assert json.loads((out / "report.json").read_text())["grid"] == note


def test_a_grid_that_is_kept_to_the_last_bit_says_nothing(integers, tmp_path, capsys):
    folder, _ = integers
    args = ["convert", "--model", str(folder), "--mlx-path", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "step" not in out + err
    assert "grid_steps" not in read_manifest(tmp_path / "out")


def test_the_rounding_is_known_after_an_interruption(integers, tmp_path, monkeypatch):
    folder, _ = integers
    whole = convert(folder, tmp_path / "whole", shard_bytes=100_000)
    finish = PartialFolder.finish_shard

    def stop(self, shard, unfinished):
        finish(self, shard, unfinished)
        if len(self.done) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "finish_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", shard_bytes=100_000)
    out = convert(folder, tmp_path / "out", shard_bytes=100_000, resume=True)
    assert read_manifest(out) == read_manifest(whole)
    assert len(read_manifest(out)["grid_steps"]) > 3
