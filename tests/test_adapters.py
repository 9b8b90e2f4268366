"""Adapters of mlx_lm.lora over our model: the same logits as with merged weights, with kernels and without."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from metal_kernels import launch
from ring_mlx import load_model
from tests.adapters import EVERYWHERE, LINEAR, PLACES, SOFTMAX, adapter, said, save, with_weights
from tests.compare import assert_close
from tests.kernel_backends import backends
from tests.tiny import PACKABLE, config, make_model, save_hf, write


def quantized(folder, bits, mode):
    model = make_model(**PACKABLE)
    nn.quantize(
        model,
        32,
        bits,
        mode=mode,
        class_predicate=lambda p, m: hasattr(m, "to_quantized") and not p.endswith("gate.gate_proj"),
    )
    settings = {"quantization": {"group_size": 32, "bits": bits, "mode": mode}}
    write(folder, config(**PACKABLE) | settings, dict(tree_flatten(model.parameters())))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by form."""
    made = {name: tmp_path_factory.mktemp("base") / name for name in ("plain", "biases", "affine", "mxfp4")}
    save_hf(made["plain"], config(**PACKABLE))
    save_hf(made["biases"], config(**PACKABLE, use_bias=True, use_qkv_bias=True))
    quantized(made["affine"], 6, "affine")
    quantized(made["mxfp4"], 4, "mxfp4")
    return made


@pytest.fixture(scope="module")
def models(folders):
    """The models in them, to be changed by nobody."""
    return {name: load_model(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("place", PLACES)
def test_each_kind_of_layer_says_what_merged_weights_say(folders, models, tmp_path, place):
    folder, merged = adapter(tmp_path / "a", models["plain"], PLACES[place])
    found = said(load_model(folders["plain"], adapter_path=folder))
    assert_close(found, said(with_weights(load_model(folders["plain"]), merged)), 1e-5)
    assert mx.abs(found - said(models["plain"])).max() > 1e-2


@pytest.mark.parametrize("form", ["plain", "biases", "affine", "mxfp4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_form_of_weights_and_kind_of_adapter(folders, models, tmp_path, form, kind):
    paths = [p for p in EVERYWHERE if kind == "lora" or "switch_mlp" not in p]
    if form == "mxfp4":
        paths.remove("model.word_embeddings")  # MLX gives its rows in bfloat16
    folder, merged = adapter(tmp_path / "a", models[form], paths, kind)
    expected = said(with_weights(load_model(folders[form]), merged))
    assert_close(said(load_model(folders[form], adapter_path=folder)), expected, 1e-5)


def test_exact_and_tied_embeddings(tmp_path):
    save_hf(tmp_path / "tied", config(**PACKABLE, tie_word_embeddings=True))
    for kind in ("lora", "dora"):
        model = load_model(tmp_path / "tied", exact=True)
        folder, merged = adapter(tmp_path / kind, model, ["model.word_embeddings", f"{LINEAR}.attention.dense"], kind)
        found = said(load_model(tmp_path / "tied", exact=True, adapter_path=folder))
        assert_close(found, said(with_weights(model, merged)), 1e-5)


def test_layers_that_were_trained_whole(folders, models, tmp_path):
    names = [n for n, _ in tree_flatten(models["plain"].parameters()) if n.startswith((LINEAR, SOFTMAX))]
    other = dict(tree_flatten(make_model(seed=8, **PACKABLE).parameters()))
    folder = save(tmp_path / "a", {n: other[n] for n in names}, "full", lora_parameters=None)
    expected = load_model(folders["plain"])
    expected.load_weights([(n, other[n]) for n in names], strict=False)
    found = load_model(folders["plain"], adapter_path=folder)
    assert_close(said(found), said(expected), 1e-6)
    assert found.fingerprint != models["plain"].fingerprint
    half = load_model(folders["plain"], adapter_path=folder, dtype=mx.float16)
    assert half.layers[1].attention.dense.weight.dtype == mx.float16
    assert half.layers[1].mlp.gate.gate_proj.weight.dtype == mx.float32


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("form", ["plain", "affine"])
def test_no_kernel_passes_an_adapter_by(folders, models, tmp_path, backend, form):
    folder, merged = adapter(tmp_path / "a", models[form], EVERYWHERE)
    expected = said(with_weights(load_model(folders[form]), merged))
    model = load_model(folders[form], adapter_path=folder)
    with launch.use(backend):
        found = said(model)
        mx.eval(found)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_pieces_of_a_decode_step_have_it_too(folders, models, tmp_path, monkeypatch, kind):
    paths = [p for p in EVERYWHERE if kind == "lora" or "switch_mlp" not in p]
    model = load_model(folders["affine"], adapter_path=adapter(tmp_path / "a", models["affine"], paths, kind)[0])
    plain = said(model)
    monkeypatch.setattr("ring_mlx.model.model.is_worthwhile", lambda: True)
    monkeypatch.setattr(mx, "compile", lambda f: f)  # takes seconds on a CPU
    assert_close(said(model), plain, 1e-6)
    assert model.model._step._pieces


@pytest.mark.parametrize("backend", backends("fast"))
def test_other_layers_keep_their_kernels(folders, models, tmp_path, backend, monkeypatch):
    launched, call = [], launch.Kernel.__call__
    monkeypatch.setattr(
        launch.Kernel, "__call__", lambda self, *a, **k: launched.append(self.name) or call(self, *a, **k)
    )

    def kernels(layer):
        launched.clear()
        with launch.use(backend):
            mx.eval(layer(mx.random.normal((1, 1, 64)), None, None, 0))
        return list(launched)

    paths = [f"{LINEAR}.attention.query_key_value", f"{SOFTMAX}.mlp.switch_mlp.up_proj"]
    adapted = load_model(folders["plain"], adapter_path=adapter(tmp_path / "a", models["plain"], paths)[0])
    for i in (0, 3, 4):
        assert kernels(adapted.layers[i]) == kernels(models["plain"].layers[i])
    attention = kernels(adapted.layers[1])
    assert len(attention) > 4
    assert attention == kernels(models["plain"].layers[1])[1:]
    assert not {"ring_decode_gate_up", "ring_decode_down"} & set(kernels(adapted.layers[2]))
