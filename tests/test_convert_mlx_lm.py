"""What mlx-lm's own tools write is a source: planned, copied, dequantized and requantized to the weights that it means."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.quant.awq import update_config
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model, save_config, save_model

from ring_mlx import load_model
from ring_mlx.convert import Options, convert, convert_plan
from ring_mlx.errors import OptionError, WeightsError
from tests.compare import assert_close
from tests.tiny import config, save_hf, tokens

RAW = config(
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=128,
    num_attention_heads=4,
    head_dim=32,
    group_norm_size=2,
    num_hidden_layers=2,
    layer_group_size=2,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)
UP = "model.layers.1.mlp.switch_mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint that mlx-lm reads."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    save_hf(folder, RAW)
    return folder


def mlx_lm_writes(source, folder, make):
    """A folder of mlx-lm's model after ``make`` changed it: make(model, config) gives both."""
    model, raw = make(*mlx_lm_load_model(source, lazy=True))
    folder.mkdir()
    save_model(folder, model)
    save_config(raw, folder / "config.json")
    return folder


def recipe(name):
    """As `mlx_lm.convert` does without --q-group-size, which gives the recipe None."""
    return lambda model, raw: quantize_model(
        model, raw, None, None, quant_predicate=mixed_quant_predicate_builder(name, model, None)
    )


def mode(name, bits=None, group=None):
    return lambda model, raw: quantize_model(model, raw, group, bits, mode=name)


def dynamic(model, raw):
    """As `mlx_lm.dynamic_quant`: settings without a mode, True elsewhere."""

    def predicate(path, module):
        return {"bits": 5, "group_size": 64} if "dense" in path else hasattr(module, "to_quantized")

    return quantize_model(model, raw, 64, 4, quant_predicate=predicate)


def awq(model, raw):
    """As `mlx_lm.awq` leaves a model: the ends in smaller groups, False for what is no matrix, no mode anywhere."""
    ends = ("word_embeddings", "lm_head")
    model, raw = quantize_model(
        model,
        raw,
        64,
        3,
        quant_predicate=lambda path, module: (
            {"group_size": 32, "bits": 4} if path.endswith(ends) else "gate." not in path
        ),
    )
    return model, update_config(model, raw)


def gptq(model, raw):
    """`mlx_lm.gptq` itself: matrices that it cannot calibrate get other bits, each named."""
    model, raw["quantization"] = gptq_quantize(model, tokens(8), 4, 64, 6, 32)
    return model, raw


MAKERS = {
    **{name: recipe(name) for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")},
    **{name: mode(name) for name in ("mxfp4", "mxfp8", "nvfp4")},
    **{f"{bits} bits in {group}": mode("affine", bits, group) for bits, group in ((1, 32), (2, 128), (5, 64), (8, 32))},
    "dynamic_quant": dynamic,
    "awq": awq,
    "gptq": gptq,
}


def meant(folder):
    """Every matrix of a folder as float64, by mlx-lm's settings: those of the module, else inferred from its shapes."""
    arrays, raw = mx.load(str(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())
    found = {}
    for name, value in arrays.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in arrays:
            scales = arrays[f"{path}.scales"]
            named = raw["quantization"].get(path)
            form = named if isinstance(named, dict) else raw["quantization"]
            value = mx.dequantize(
                value,
                scales,
                arrays.get(f"{path}.biases"),
                form.get("group_size"),
                form.get("bits"),
                form.get("mode", "affine"),
                dtype=mx.float32,
            )
        if not name.endswith((".scales", ".biases")):
            found[name] = np.array(value.astype(mx.float32))
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_every_recipe_and_mode_is_read(source, tmp_path, name):
    theirs = mlx_lm_writes(source, tmp_path / "theirs", MAKERS[name])
    for options in (Options(), Options(quantize=True), Options(dequantize=True)):
        assert convert_plan(theirs, options)[1].nbytes > 0
    expected = meant(theirs)
    floats = mx.load(str(convert(theirs, tmp_path / "floats", dequantize=True) / "model.safetensors"))
    assert set(floats) == set(expected)
    for each, value in floats.items():
        assert_close(value, expected[each], 1e-6)
    copy = convert(theirs, tmp_path / "copy")
    assert_close(load_model(copy)(tokens(5)), load_model(theirs)(tokens(5)), 1e-6)
    kept = mx.load(str(copy / "model.safetensors"))
    for each, value in mx.load(str(theirs / "model.safetensors")).items():
        assert mx.array_equal(kept[each], value)
    again = load_model(convert(theirs, tmp_path / "again", quantize=True, bits=8, fit="rtn"))
    assert again.layers[1].mlp.switch_mlp.up_proj.bits == 8


def test_a_scale_over_the_scales_is_not_passed_over(source, tmp_path):
    theirs = mlx_lm_writes(
        source,
        tmp_path / "theirs",
        lambda model, raw: quantize_model(model, raw, None, None, "nvfp4", global_scale=True),
    )
    arrays = mx.load(str(theirs / "model.safetensors"))
    expected = [
        mx.dequantize(
            *(arrays[f"{UP}.{part}"][e] for part in ("weight", "scales")),
            None,
            mode="nvfp4",
            global_scale=arrays[f"{UP}.global_scale"][e],
            dtype=mx.float32,
        )
        for e in range(4)
    ]
    out = convert(theirs, tmp_path / "out", dequantize=True)
    assert_close(mx.load(str(out / "model.safetensors"))[f"{UP}.weight"], mx.stack(expected), 1e-6)
    with pytest.raises(OptionError, match="add -q to requantize or -d to dequantize"):
        convert(theirs, tmp_path / "kept")
    with pytest.raises(WeightsError, match="global_scale scales nvfp4 once more"):
        load_model(theirs)
