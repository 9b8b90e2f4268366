"""Bits chosen by module for a size: the choice against all there are, what is measured, and the recipe that is written."""

from __future__ import annotations

import itertools
import json

import mlx.core as mx
import mlx_lm.models.bailing_moe_linear as stock
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model

from ring_mlx import load_model
from ring_mlx.cli import main
from ring_mlx.convert import Options, convert, convert_plan, report, sensitivity, target, writer
from ring_mlx.convert.allocation import Choice, allocate
from ring_mlx.errors import ConvertError, OptionError
from ring_mlx.evaluation.divergence import divergence
from ring_mlx.model.decay import decay_rate
from tests.compare import assert_close
from tests.kill_and_resume import folder_hashes
from tests.test_convert_calibrated import TEXT, Stopped, source
from tests.tiny import tokens

__all__ = ["source"]
OPTIONS = {"quantize": True, "group_size": 32, "text": TEXT, "fit": "rtn"}


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_nearly_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    modules = []
    for _ in range(5):
        size, loss = int(rng.integers(10, 200)), rng.uniform(0.1, 9)
        modules.append([Choice(b, size * b + 3, loss * 4.0**-b * rng.uniform(0.5, 2)) for b in (2, 3, 4, 6, 8)])
    least, most = (sum(f(c.nbytes for c in some) for some in modules) for f in (min, max))
    largest_step = max(c.nbytes for some in modules for c in some)
    assert allocate(modules, least - 1) is None
    for budget in (least, (least + most) // 2, most):
        chosen = allocate(modules, budget)
        assert sum(c.nbytes for c in chosen) <= budget
        every = [p for p in itertools.product(*modules) if sum(c.nbytes for c in p) <= budget - largest_step]
        best = min((sum(c.loss for c in p) for p in every), default=float("inf"))
        assert sum(c.loss for c in chosen) <= best * 1.0001


def test_what_is_measured_is_the_divergence_of_each_group_alone(source, tmp_path):
    opened, plan = convert_plan(source, Options(quantize=True, group_size=32))
    found = sensitivity.measure(opened, plan, TEXT)
    assert len(found) == 2 + 2 * 2 + 2 + 2 * 2, "ends, attention, dense block, experts"
    assert not any("gate.gate_proj" in group for group in found)
    (batch,) = report.make_batches(source, TEXT)
    exact = load_model(source, dtype=mx.float32)(batch.tokens)
    for group, pattern in {
        "model.layers.0.attention.query_key_value": ["layers.0.*query_key_value", "layers.0.*g_proj"],
        "model.layers.1.mlp.switch_mlp.down_proj": ["switch_mlp.down_proj"],
        "model.word_embeddings": ["word_embeddings"],
        "lm_head": ["lm_head"],
    }.items():
        overrides = ["*=none", *(f"{p}=3" for p in pattern)]
        one = convert(source, tmp_path / group, **OPTIONS | {"overrides": overrides})
        logits = load_model(one, dtype=mx.float32)(batch.tokens)
        rows = [
            divergence(exact[r, : end - 1], logits[r, : end - 1], batch.tokens[r, 1:end])[0]
            for r, (_, end) in enumerate(batch.spans)
        ]
        assert found[group][3] == pytest.approx(np.concatenate(rows).mean(), rel=1e-2)
        losses = [found[group][b] for b in (2, 3, 4, 5, 6, 8)]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("asked", [{"target_bits": 5.5}, {"target_bytes": 200_000}])
def test_the_size_is_kept_and_the_recipe_can_be_used_again(source, tmp_path, asked):
    out = convert(source, tmp_path / "out", **OPTIONS | asked)
    recipe = json.loads((out / target.RECIPE).read_text())
    plan = convert_plan(out, Options())[1]
    files = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    weights = sum(o.count for o in plan.outputs)
    most = asked.get("target_bytes") or asked["target_bits"] * weights / 8
    assert 0.9 * most < plan.nbytes <= most
    assert files <= most or "target_bits" in asked
    settings = {o.path: o.setting.bits for o in plan.outputs if o.setting is not None}
    assert settings == recipe["bits"]
    assert len(set(settings.values())) > 1
    assert settings["model.layers.0.attention.query_key_value"] == settings["model.layers.0.attention.g_proj"]
    again = convert(source, tmp_path / "again", **OPTIONS | {"recipe": str(out / target.RECIPE), "text": None})
    same = {n: h for n, h in folder_hashes(out).items() if n not in ("conversion.json", "README.md")}
    assert {n: h for n, h in folder_hashes(again).items() if n in same} == same
    assert str(tmp_path) not in (again / "conversion.json").read_text()
    load_model(again)
    whole = folder_hashes(out)
    assert folder_hashes(convert(source, out, resume=True, **OPTIONS | asked)) == whole


def test_stopped_and_continued_it_keeps_what_it_measured(source, tmp_path, monkeypatch):
    options = OPTIONS | {"target_bits": 5.5, "calibrate": True}
    whole = folder_hashes(convert(source, tmp_path / "whole", **options))
    finish = writer.PartialFolder.finish_shard

    def finishing(self, shard, unfinished):
        finish(self, shard, unfinished)
        if len(self.done) == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(writer.PartialFolder, "finish_shard", finishing)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "out", **options)
    monkeypatch.setattr(target, "measure", lambda *args: pytest.fail("it was measured already"))
    kept = writer.partial_folder(tmp_path / "out") / target.RECIPE
    text = kept.read_text()
    kept.write_text(text.replace("8", "6", 1))
    with pytest.raises(ConvertError, match="started with another recipe"):
        convert(source, tmp_path / "out", resume=True, **options)
    kept.write_text(text)
    assert folder_hashes(convert(source, tmp_path / "out", resume=True, **options)) == whole


def test_stock_mlx_lm_computes_the_same_from_it(source, tmp_path, monkeypatch):
    def right_slopes(self):
        return -decay_rate(self.num_attention_heads, self.layer_idx, self.num_hidden_layers)

    monkeypatch.setattr(stock.LinearAttention, "_get_slopes", right_slopes)
    out = convert(source, tmp_path / "out", **OPTIONS | {"target_bits": 5.5, "calibrate": True})
    theirs, _ = mlx_lm_load_model(out)
    assert_close(load_model(out)(tokens(40)), theirs(tokens(40)), 1e-4)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--target-bits", "4"], "--target-bits needs --quantize"),
        (["-q", "--target-bits", "4", "--q-bits", "4"], "--target-bits chooses the bits itself; leave --q-bits out"),
        (["-q", "--target-size", "1MB", "--quant-predicate", "ring-q4"], "leave --quant-predicate out"),
        (["-q", "--target-size", "1KB"], "cannot be reached: with 2 bits it is"),
        (["-q", "--quant-predicate", "/nowhere/recipe.json"], "is no recipe (No such file"),
        (["-q", "--quant-predicate", "BAD.json"], "is no recipe (it names no bits by module that MLX has)"),
        (["-q", "--quant-predicate", "OTHER.json"], "the recipe names no bits for"),
    ],
)
def test_what_is_refused(source, tmp_path, capsys, args, match):
    (tmp_path / "BAD.json").write_text('{"bits": {"lm_head": 7}}')
    (tmp_path / "OTHER.json").write_text('{"bits": {"lm_head": 4}}')
    given = [str(tmp_path / a) if a.endswith(".json") and a[0].isupper() else a for a in args]
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out"), "--q-group-size", "32", *given]
    assert main(command if "-q" in args else [c for c in command if c not in ("--q-group-size", "32")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_still_on_the_hub_are_not_measured(source, monkeypatch):
    opened, _ = convert_plan(source, Options())
    remote = type(opened)(**vars(opened) | {"repo": ("a/b", None)})
    with pytest.raises(OptionError, match="still on the hub"):
        target.find_recipe(remote, Options(quantize=True, target_bits=4), None, TEXT)
