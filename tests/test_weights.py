"""Checkpoints in both forms, whole and damaged."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ring_mlx import load_model
from ring_mlx.checkpoint.weights import lies_by_columns
from ring_mlx.convert.sources import matrices, open_source
from ring_mlx.distributed.loading import load_sharded
from ring_mlx.errors import ConfigError, NoFitError, WeightsError
from ring_mlx.experts.layout import find_experts
from ring_mlx.mlx_lm_plugin import architecture
from ring_mlx.model.config import read_config
from tests.compare import assert_close
from tests.tiny import config, save_hf, softmax_config, tokens, write


def refused(folder, match, error=WeightsError):
    with pytest.raises(error, match=match) as e:
        load_model(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_form(tmp_path, shards):
    model = save_hf(tmp_path, config(), shards=shards)
    assert_close(load_model(tmp_path)(tokens(20)), model(tokens(20)), 1e-6)


def test_softmax_sibling(tmp_path):
    model = save_hf(tmp_path, softmax_config())
    assert_close(load_model(tmp_path)(tokens(20)), model(tokens(20)), 1e-6)


def save_stacked(folder, model, raw):
    write(folder, raw, dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize(
    ("bits", "mode", "group_size"), [(4, "affine", 32), (8, "affine", 32), (4, "mxfp4", 32), (8, "mxfp8", 32)]
)
def test_mlx_community_form_quantized(tmp_path, bits, mode, group_size):
    raw = config(
        hidden_size=64, intermediate_size=96, moe_shared_expert_intermediate_size=32, head_dim=32, num_experts=8
    )
    model = save_hf(tmp_path / "hf", raw)
    router = {"group_size": 64, "bits": 8}

    def predicate(path, module):
        return router if path.endswith("gate.gate_proj") else hasattr(module, "to_quantized")

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=predicate)
    named = {f"model.layers.{i}.mlp.gate.gate_proj": router for i in range(1, 5)}
    quantization = {"group_size": group_size, "bits": bits, "mode": mode} | named
    save_stacked(tmp_path / "q", model, raw | {"quantization": quantization, "quantization_config": quantization})
    loaded = load_model(tmp_path / "q")
    assert type(loaded.layers[1].mlp.switch_mlp.up_proj).__name__ == "QuantizedSwitchLinear"
    assert loaded.layers[1].mlp.gate.gate_proj.bits == 8
    assert_close(loaded(tokens(70)), model(tokens(70)), 1e-5)


def test_settings_are_inferred_where_config_does_not_name_a_layer(tmp_path):
    raw = config(hidden_size=64, intermediate_size=96, num_experts=0)
    model = save_hf(tmp_path / "hf", raw)
    nn.quantize(model, 32, 8, class_predicate=lambda p, m: isinstance(m, nn.Linear) and "mlp" in p)
    save_stacked(tmp_path / "q", model, raw | {"quantization": {"group_size": 64, "bits": 4}})
    assert_close(load_model(tmp_path / "q")(tokens(20)), model(tokens(20)), 1e-5)


def test_dtype_follows_the_wish_the_backend_and_the_file(tmp_path):
    raw = config(torch_dtype="bfloat16")
    model = save_hf(tmp_path / "hf", raw)
    model.set_dtype(mx.bfloat16)
    save_stacked(tmp_path / "s", model, raw)
    kinds = {}
    for name, wish in (("default", None), ("half", mx.bfloat16)):
        parameters = dict(tree_flatten(load_model(tmp_path / "s", dtype=wish).parameters()))
        kinds[name] = {p.dtype for n, p in parameters.items() if ".mlp.gate." not in n}
        assert {p.dtype for n, p in parameters.items() if ".mlp.gate." in n} == {mx.float32}
    expected = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert kinds == {"default": {expected}, "half": {mx.bfloat16}}


def test_matrices_lie_by_columns_for_the_products_of_a_cpu(tmp_path):
    model = save_hf(tmp_path, config())
    rows = dict(tree_flatten(model.parameters()))
    parameters = dict(tree_flatten(load_model(tmp_path).parameters()))
    by_columns = {n for n, p in parameters.items() if p.ndim > 1 and memoryview(p).strides[-2:] == (4, 4 * p.shape[-2])}
    matrices = {n for n, p in parameters.items() if p.ndim > 1 and n != "model.word_embeddings.weight"}
    assert "model.layers.1.mlp.switch_mlp.down_proj.weight" in matrices
    assert by_columns == (matrices if mx.default_device() == mx.cpu else set())
    assert all(mx.array_equal(parameters[n], rows[n]) for n in rows)
    halves = dict(tree_flatten(load_model(tmp_path, dtype=mx.float16).parameters()))
    assert not lies_by_columns("lm_head.weight", halves["lm_head.weight"])


def test_names_that_are_skipped(tmp_path):
    model = save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    extra = [
        "model.layers.5.attention.dense.weight",
        "model.mtp.0.w",
        "model.layers.0.attention.slope",
        "rotary.inv_freq",
    ]
    write(tmp_path, config(), tensors | {name: mx.ones((3,)) for name in extra})
    assert_close(load_model(tmp_path)(tokens(9)), model(tokens(9)), 1e-6)


def test_a_tied_head_is_ignored(tmp_path):
    model = save_hf(tmp_path, config(tie_word_embeddings=True))
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    write(tmp_path, config(tie_word_embeddings=True), tensors | {"lm_head.weight": mx.ones((70, 48))})
    assert_close(load_model(tmp_path)(tokens(9)), model(tokens(9)), 1e-6)


def test_missing_extra_and_misshapen_are_listed_together(tmp_path):
    save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    del tensors["model.norm.weight"]
    tensors["model.layers.2.attention.dense.weight"] = mx.ones((48, 95))
    tensors["model.layers.0.surprise"] = mx.ones((2,))
    write(tmp_path, config(), tensors)
    message = refused(tmp_path, "does not match its config.json")
    for part in (
        "missing model.norm.weight",
        "unknown model.layers.0.surprise",
        "dense.weight (48, 95) instead of (48, 96)",
    ):
        assert part in message


def test_a_missing_and_a_surplus_expert_are_named(tmp_path):
    save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    gone = tensors.pop("model.layers.3.mlp.experts.7.up_proj.weight")
    write(tmp_path, config(), tensors)
    assert "lacks 7" in refused(tmp_path, "model.layers.3.mlp.switch_mlp.up_proj.weight should stack experts 0 to 11")
    tensors["model.layers.3.mlp.experts.7.up_proj.weight"] = gone
    tensors["model.layers.3.mlp.experts.12.up_proj.weight"] = gone
    write(tmp_path, config(), tensors)
    refused(tmp_path, "also has 12")


@pytest.mark.parametrize("odd", [None, mx.ones((31, 48)), mx.ones((96, 48), mx.int8)])
def test_every_reader_names_the_stack_and_what_is_wrong_with_it(tmp_path, odd):
    save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    tensors = {n: a for n, a in tensors.items() if n != name} | ({} if odd is None else {name: odd})
    write(tmp_path, config(), tensors)
    c = read_config(tmp_path)[0]
    readers = (
        lambda: load_model(tmp_path),
        lambda: matrices(open_source(tmp_path)),
        lambda: find_experts(tmp_path, c),
        lambda: load_sharded(tmp_path, mx.distributed.init(), "tensor"),
        lambda: architecture.Model(architecture.ModelArgs.from_dict(config())).sanitize(dict(tensors)),
    )
    stack = "model.layers.3.mlp.switch_mlp.up_proj.weight"
    wanted = (
        f"{stack} should stack experts 0 to 11, but lacks 7" if odd is None else f"experts of {stack} differ in shape"
    )
    for read in readers:
        with pytest.raises(WeightsError, match=wanted):
            read()


def test_experts_of_different_shapes(tmp_path):
    save_hf(tmp_path, config())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    tensors["model.layers.3.mlp.experts.7.up_proj.weight"] = mx.ones((31, 48))
    write(tmp_path, config(), tensors)
    refused(tmp_path, "differ in shape")


def test_damaged_folders(tmp_path):
    good = tmp_path / "good"
    save_hf(good, config(), shards=3)
    first = "model-00001-of-00003.safetensors"

    def copy(name):
        return shutil.copytree(good, tmp_path / name)

    folder = copy("lost")
    (folder / first).unlink()
    refused(folder, f"lacks {first} of 3 shards")
    folder = copy("cut")
    (folder / first).write_bytes((good / first).read_bytes()[:-10])
    refused(folder, f"{first} is truncated or damaged")
    folder = copy("header")
    (folder / first).write_bytes(b"\xff" * 100)
    refused(folder, f"{first} is truncated or damaged")
    folder = copy("zero")
    (folder / first).write_bytes(b"")
    refused(folder, f"{first} is truncated or damaged")
    folder = copy("index")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "no weight_map")
    folder = copy("json")
    (folder / "config.json").write_text("{")
    refused(folder, "not valid JSON", ConfigError)
    folder = copy("list")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds a list", ConfigError)
    folder = copy("binary")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "not valid JSON", ConfigError)
    folder = copy("noconfig")
    (folder / "config.json").unlink()
    refused(folder, "no config.json", ConfigError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json", ConfigError)
    folder = copy("noweights")
    for f in folder.glob("*.safetensors*"):
        f.unlink()
    refused(folder, "no .safetensors file")


def test_quantization_of_other_makers_is_refused_by_name(tmp_path):
    save_hf(tmp_path, config())
    raw = config(quantization_config={"quant_method": "gptq", "bits": 4})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(tmp_path, "quantization method 'gptq'")


def test_data_that_cannot_be_read(tmp_path, monkeypatch):
    def fail(model, progress):
        raise RuntimeError("[read] Unable to read from file.")

    save_hf(tmp_path, config())
    monkeypatch.setattr("ring_mlx.checkpoint.loading._read", fail)
    refused(tmp_path, "Unable to read")


def test_a_dtype_that_mlx_does_not_take(tmp_path):
    save_hf(tmp_path, config())
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F8_E4M3"
    start, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["shape"] = [end - start]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(tmp_path, "model.norm.weight has dtype F8_E4M3")


def test_what_does_not_fit_is_refused_before_reading(tmp_path, monkeypatch):
    import ring_mlx.model.memory as memory

    save_hf(tmp_path / "ring", config())
    monkeypatch.setattr(memory, "budget_bytes", lambda: 1 << 29)
    message = refused(tmp_path / "ring", "ring needs", NoFitError)
    assert "this machine can give 0.5 GB" in message


def test_fingerprints_tell_models_apart(tmp_path):
    save_hf(tmp_path / "a", config(), seed=0)
    save_hf(tmp_path / "b", config(), seed=1)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    marks = [load_model(tmp_path / n).fingerprint for n in "abc"]
    assert marks[0] == marks[2] != marks[1]
    assert load_model(tmp_path / "a", exact=True).fingerprint != marks[0]
    file = tmp_path / "a" / "config.json"
    for offset in (0, -1):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"decay_layer_offset": offset}))
        assert (load_model(tmp_path / "a").fingerprint == marks[0]) == (offset == 0)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_change_within_one_tensor_changes_the_fingerprint(tmp_path, at):
    save_hf(tmp_path / "a", config())
    before = load_model(tmp_path / "a").fingerprint
    path = tmp_path / "a" / "model.safetensors"
    tensors = mx.load(str(path))
    name = "model.layers.2.attention.dense.weight"
    changed = np.array(tensors[name])
    changed.reshape(-1)[int(at * (changed.size - 1))] += 1
    mx.save_safetensors(str(path), tensors | {name: mx.array(changed)})
    assert load_model(tmp_path / "a").fingerprint != before


def test_samples_of_a_large_tensor_cover_both_ends():
    from ring_mlx.checkpoint.fingerprint import SAMPLE_BYTES, _places

    assert _places(100, 100 + SAMPLE_BYTES) == [100]
    places = _places(0, 1 << 30)
    assert (places[0], places[-1]) == (0, (1 << 30) - SAMPLE_BYTES)
    assert len(places) == 17


@pytest.mark.parametrize("exact", [True, False])
def test_the_head_of_an_exact_model_is_float32(tmp_path, exact):
    """Other matrices stay as asked, and the logits are not rounded to less."""
    save_hf(tmp_path, config())
    model = load_model(tmp_path, dtype=mx.bfloat16, exact=exact)
    assert model.lm_head.weight.dtype == (mx.float32 if exact else mx.bfloat16)
    assert model.model.word_embeddings.weight.dtype == mx.bfloat16
    logits = model(tokens(3), last_only=True)
    assert logits.dtype == model.lm_head.weight.dtype
    assert mx.array_equal(logits, logits.astype(mx.bfloat16).astype(logits.dtype)).item() != exact
