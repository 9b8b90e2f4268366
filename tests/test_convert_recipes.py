"""Which module gets how many bits, and that the search of scales is never worse than rounding."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_mlx.convert import convert, convert_plan, describe
from ring_mlx.convert.conversion import size_table
from ring_mlx.convert.fit import quantize
from ring_mlx.convert.grids import pack, unpack
from ring_mlx.convert.options import Options
from ring_mlx.convert.plan import quantizable_paths
from ring_mlx.convert.recipes import MIXED, RECIPES, ROUTER, Setting, make_rule, uses_more_bits
from ring_mlx.model.config import RingConfig
from tests.compare import relative_rms
from tests.foreign import shape
from tests.tiny import GOLDENS, config, save_hf

GOLDEN = GOLDENS / "mini_like"
DEFAULT = Setting(64, 4)


def bits_by_path(recipe, overrides=(), **changes):
    checked = RingConfig.from_dict(config(num_hidden_layers=16, **changes))
    rule = make_rule(DEFAULT, recipe, overrides, 16)
    return {path: rule(path) for path in quantizable_paths(checked)}


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_router_stays_in_float_under_every_recipe(recipe):
    found = bits_by_path(recipe)
    routers = {p for p in found if p.endswith(ROUTER)}
    assert len(routers) == 15
    assert {p for p, s in found.items() if s is None} == routers


def test_only_an_override_that_names_the_router_reaches_it():
    for pattern in ("*=4", "gate_proj=3", "mlp=8"):
        found = bits_by_path(None, [pattern])
        assert found["model.layers.1.mlp.gate.gate_proj"] is None
    named = bits_by_path("ring-q4", ["gate.gate_proj=8"])
    assert named["model.layers.1.mlp.gate.gate_proj"] == Setting(64, 8)


def test_the_last_override_that_matches_counts():
    found = bits_by_path("mixed_3_6", ["layers.3.=8", "layers.3.*down_proj=none", "lm_head=5"])
    assert found["model.layers.3.attention.dense"].bits == 8
    assert found["model.layers.3.mlp.switch_mlp.down_proj"] is None
    assert found["model.layers.13.attention.dense"].bits == 3, "13 is not 3"
    assert found["lm_head"].bits == 5


@pytest.mark.parametrize(("recipe", "bits"), MIXED.items())
def test_mixed_recipes_spend_as_mlx_lm_does(recipe, bits):
    """Against mlx-lm's own builder, for what this model has under the same name."""
    from mlx_lm.convert import mixed_quant_predicate_builder

    from ring_mlx.model.model import Model

    low, high = bits
    model = Model(RingConfig.from_dict(config(num_hidden_layers=16)))
    theirs = mixed_quant_predicate_builder(recipe, model, 64)
    for path, setting in bits_by_path(recipe).items():
        if path.endswith(ROUTER):
            assert theirs(path, None)["bits"] in bits, "mlx-lm lets its recipes reach the router"
        elif path.endswith("query_key_value"):
            assert setting.bits == (high if uses_more_bits(int(path.split(".")[2]), 16) else low)
        else:
            assert setting.as_config() == theirs(path, None), path


def test_ring_recipes_spend_on_everything_but_the_routed_experts():
    found = bits_by_path("ring-q4")
    assert {s.bits for p, s in found.items() if ".switch_mlp." in p} == {4}
    assert {s.bits for p, s in found.items() if ".switch_mlp." not in p and s} == {8}


@pytest.mark.parametrize("options", [{}, {"mode": "mxfp4"}, {"recipe": "ring-q3", "group_size": 32}])
def test_the_dry_run_tells_the_bytes_that_are_written(tmp_path, options):
    plan = convert_plan(GOLDEN, Options(quantize=True, **options))
    out = convert(GOLDEN, tmp_path / "out", quantize=True, fit="rtn", **options)
    arrays = mx.load(str(out / "model.safetensors"))
    assert plan[1].nbytes == sum(a.nbytes for a in arrays.values())
    text = size_table(*plan)
    assert f"{plan[1].nbytes:,}" in text
    assert "917,000" in text
    assert ("left in float" in text) == (not options), "group 64 does not divide the experts' 32 columns"


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]))
@settings(max_examples=20, deadline=None)
def test_the_search_is_never_worse_in_any_group(seed, bits, group):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((3, 2 * group)) * 10.0 ** rng.uniform(-4, 3)
    if seed % 5 == 0:
        w[0] = w[0, 0]
    if seed % 7 == 0:
        w[1, :group] = 0
    x = mx.array(w.astype(np.float32)).astype(mx.bfloat16)
    errors = {}
    for fit in ("rtn", "fast"):
        p = quantize(x, Setting(group, bits), mx.bfloat16, fit)
        back = mx.dequantize(p["weight"], p["scales"].astype(mx.float32), p["biases"].astype(mx.float32), group, bits)
        assert mx.isfinite(back).all().item()
        square = np.square(np.array(back - x.astype(mx.float32), dtype=np.float64))
        errors[fit] = square.reshape(3, 2, group).sum(-1)
    assert (errors["fast"] <= errors["rtn"] * (1 + 1e-4) + 1e-30).all()


def test_the_search_gains_what_the_documentation_says():
    w = mx.random.normal((64, 1024), key=mx.random.key(0))
    gain = {}
    for bits in (3, 4, 6):
        error = []
        for fit in ("rtn", "fast"):
            p = quantize(w, Setting(64, bits), mx.bfloat16, fit)
            scales, biases = p["scales"].astype(mx.float32), p["biases"].astype(mx.float32)
            error.append(relative_rms(mx.dequantize(p["weight"], scales, biases, 64, bits), w))
        gain[bits] = (error[0] / error[1]) ** 2
    assert gain[3] > 1.3
    assert gain[4] > 1.2
    assert gain[6] > 1.1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlxs(bits):
    w = mx.random.normal((5, 192), key=mx.random.key(bits))
    weight, scales, biases = mx.quantize(w, 64, bits)
    codes = mx.dequantize(weight, mx.ones_like(scales), mx.zeros_like(biases), 64, bits).astype(mx.uint32)
    assert mx.array_equal(pack(codes, bits), weight)
    if 32 % bits == 0:
        assert mx.array_equal(unpack(weight, bits), codes)


def test_a_recipe_changes_only_what_it_names(tmp_path):
    save_hf(tmp_path / "hf", shape())
    arrays = {}
    for recipe in ("ring-q4", "ring-q3"):
        out = convert(tmp_path / "hf", tmp_path / recipe, quantize=True, recipe=recipe, fit="rtn")
        arrays[recipe] = mx.load(str(out / "model.safetensors"))
    differ = {
        n
        for n in arrays["ring-q4"]
        if arrays["ring-q4"][n].shape != arrays["ring-q3"][n].shape
        or not mx.array_equal(arrays["ring-q4"][n], arrays["ring-q3"][n])
    }
    assert differ
    assert all(".switch_mlp." in n for n in differ)


@pytest.mark.parametrize(("recipe", "bits"), [("ring-q6", 8), ("mixed_2_6", 2), ("mixed_3_6", 3)])
def test_config_names_the_commonest_setting_of_a_recipe(tmp_path, recipe, bits):
    out = convert(GOLDEN, tmp_path / "out", quantize=True, group_size=32, recipe=recipe, fit="rtn")
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert quantization["bits"] == bits
    assert f"{bits}-bit affine" in describe(out)
    named = [v["bits"] for v in quantization.values() if isinstance(v, dict)]
    assert named
    assert bits not in named
