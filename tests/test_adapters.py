"""Adapters of mlx_lm.lora over our model: the same logits as with merged weights, kernels, caches, and bad folders."""

from __future__ import annotations

import json
import os
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_kernels import launch
from ring_mlx import RingError, Sampling, Session, load_model
from ring_mlx.cli import main
from ring_mlx.moe import ExpertLinear
from ring_mlx.packing import packed
from ring_mlx.serve.parts import Parts
from ring_mlx.serve.settings import Settings
from tests.compare import assert_close
from tests.kernel_backends import backends
from tests.tiny import config, make_model, save_hf, tokens, write

SHAPES = {
    "head_dim": 32,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 96,
}
LINEAR, SOFTMAX = "model.layers.1", "model.layers.2"
PLACES = {
    "linear attention": [f"{LINEAR}.attention.{n}" for n in ("query_key_value", "g_proj", "dense")],
    "softmax attention": [f"{SOFTMAX}.attention.{n}" for n in ("query_key_value", "dense")],
    "dense block": [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")],
    "router": [f"{LINEAR}.mlp.gate.gate_proj"],
    "experts": [f"{LINEAR}.mlp.switch_mlp.{n}_proj" for n in ("gate", "up", "down")],
    "shared expert": [f"{SOFTMAX}.mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")],
    "ends": ["model.word_embeddings", "lm_head"],
}
EVERYWHERE = [path for paths in PLACES.values() for path in paths]
RANK, SCALE = 3, 1.5


def quantised(folder, bits, mode):
    model = make_model(**SHAPES)
    nn.quantize(
        model,
        32,
        bits,
        mode=mode,
        class_predicate=lambda p, m: hasattr(m, "to_quantized") and not p.endswith("gate.gate_proj"),
    )
    settings = {"quantization": {"group_size": 32, "bits": bits, "mode": mode}}
    write(folder, config(**SHAPES) | settings, dict(tree_flatten(model.parameters())))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by form."""
    made = {name: tmp_path_factory.mktemp("base") / name for name in ("plain", "biases", "affine", "mxfp4")}
    save_hf(made["plain"], config(**SHAPES))
    save_hf(made["biases"], config(**SHAPES, use_bias=True, use_qkv_bias=True))
    quantised(made["affine"], 6, "affine")
    quantised(made["mxfp4"], 4, "mxfp4")
    return made


@pytest.fixture(scope="module")
def models(folders):
    """The models in them, to be changed by nobody."""
    return {name: load_model(folder) for name, folder in folders.items()}


def module_at(model, path):
    return dict(model.named_modules())[path]


def change_of(path, model, seed):
    """Random A and B, and what they add to the weight."""
    *count, rows, columns = packed(module_at(model, path)).dequantize().shape
    rng = np.random.default_rng(seed)
    if path == "model.word_embeddings":
        a, b = rng.normal(size=(rows, RANK)), rng.normal(size=(RANK, columns))
        change = a @ b
    elif count:
        a, b = rng.normal(size=(*count, RANK, columns)), rng.normal(size=(*count, rows, RANK))
        change = b @ a
    else:
        a, b = rng.normal(size=(columns, RANK)), rng.normal(size=(RANK, rows))
        change = (a @ b).T
    return a / columns**0.5, b / 4, change / columns**0.5 / 4


def save(folder, tensors, kind="lora", **changes):
    folder.mkdir(exist_ok=True)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.5, "keys": None}
    settings = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {n: mx.array(t) for n, t in tensors.items()})
    return folder


def adapter(folder, model, paths, kind="lora", seed=0):
    """An adapter's folder, and the weights that a model with it has."""
    tensors, merged = {}, {}
    for i, path in enumerate(paths):
        a, b, change = change_of(path, model, seed + i)
        weight = np.array(packed(module_at(model, path)).dequantize()).astype(np.float64) + SCALE * change
        tensors |= {f"{path}.lora_a": a.astype(np.float32), f"{path}.lora_b": b.astype(np.float32)}
        if kind == "dora":
            lengths = np.random.default_rng(i).uniform(0.5, 1.5, weight.shape[0])
            tensors[f"{path}.m"] = lengths.astype(np.float32)
            weight *= (lengths / np.linalg.norm(weight, axis=1))[:, None]
        merged[path] = mx.array(weight.astype(np.float32))
    return save(folder, tensors, kind), merged


def with_weights(model, merged):
    """The model with plain layers of these weights."""
    for path, weight in merged.items():
        old, (parent, _, name) = module_at(model, path), path.rpartition(".")
        if weight.ndim == 3:
            new = ExpertLinear(*weight.shape[:0:-1], weight.shape[0], bias=False)
        elif path == "model.word_embeddings":
            new = nn.Embedding(*weight.shape)
        else:
            new = nn.Linear(*weight.shape[::-1], bias=False)
        new.weight = weight
        if "bias" in old:
            new.bias = old.bias
        setattr(module_at(model, parent) if parent else model, name, new)
    model.eval()
    return model


def said(model):
    """Logits of a prompt in two steps, and of two tokens after it."""
    ids, cache = tokens(12, seed=3), model.make_cache()
    ends = (7, 10, 11, 12)
    logits = [model(ids[:, i:j], cache) for i, j in zip((0, *ends), ends, strict=False)]
    return mx.concatenate(logits, axis=1)


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
    save_hf(tmp_path / "tied", config(**SHAPES, tie_word_embeddings=True))
    for kind in ("lora", "dora"):
        model = load_model(tmp_path / "tied", exact=True)
        folder, merged = adapter(tmp_path / kind, model, ["model.word_embeddings", f"{LINEAR}.attention.dense"], kind)
        found = said(load_model(tmp_path / "tied", exact=True, adapter_path=folder))
        assert_close(found, said(with_weights(model, merged)), 1e-5)


def test_layers_that_were_trained_whole(folders, models, tmp_path):
    names = [n for n, _ in tree_flatten(models["plain"].parameters()) if n.startswith((LINEAR, SOFTMAX))]
    other = dict(tree_flatten(make_model(seed=8, **SHAPES).parameters()))
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
    monkeypatch.setattr("ring_mlx.model.is_worthwhile", lambda: True)
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


# What is kept of another adapter is never used.


@pytest.fixture(scope="module")
def pair(chat_folder, tmp_path_factory):
    """Two adapters for `chat_folder` that differ in one number in the middle."""
    where, model = tmp_path_factory.mktemp("pair"), load_model(chat_folder)
    first, _ = adapter(where / "a", model, PLACES["softmax attention"])
    tensors = mx.load(str(first / "adapters.safetensors"))
    tensors[f"{SOFTMAX}.attention.dense.lora_b"][RANK // 2, 20] += 0.5
    return first, save(where / "b", tensors)


def test_whatever_changes_the_model_changes_the_fingerprint(chat_folder, pair, tmp_path):
    other = shutil.copytree(pair[0], tmp_path / "scale")
    settings(lora_parameters={"rank": RANK, "scale": SCALE / 2})(other)
    folders = [None, *pair, other]
    marks = [load_model(chat_folder, adapter_path=f).fingerprint for f in folders]
    assert len(set(marks)) == len(marks)
    assert all(len(m) == 32 for m in marks)
    again = shutil.copytree(pair[0], tmp_path / "again")
    assert load_model(chat_folder, adapter_path=again).fingerprint == marks[1]


def test_a_prompt_cache_belongs_to_one_adapter(chat_folder, pair, tmp_path, capsys):
    file = str(tmp_path / "prompt.safetensors")
    common = ["--model", str(chat_folder), "--prompt-cache-file", file, "--prompt", "one two"]
    assert main(["cache-prompt", *common, "--adapter-path", str(pair[0])]) == 0
    for options, code in (
        (["--adapter-path", str(pair[0])], 0),
        (["--adapter-path", str(pair[1])], 2),
        ([], 2),
    ):
        capsys.readouterr()
        assert main(["generate", *common, "-m", "2", *options]) == code
        assert ("[cache]" in capsys.readouterr().err) == (code == 2)


def test_snapshots_belong_to_one_adapter(chat_folder, pair, tmp_path):
    messages = [{"role": "user", "content": "What is 2 + 3? " * 4}]
    read = []
    for folder in (pair[0], pair[1], None, pair[0]):
        with Session(chat_folder, adapter_path=folder, store=tmp_path, read_ahead=False) as session:
            list(session.send(messages, sampling=Sampling(temp=0), max_tokens=2))
            read.append(session.counters.reused_tokens)
    assert read[:3] == [0, 0, 0]
    assert read[3] > 0


def test_the_server_loads_it(chat_folder, pair):
    parts = Parts.load(Settings(model=chat_folder, name="x", adapter_path=pair[0]))
    assert parts.model.fingerprint == load_model(chat_folder, adapter_path=pair[0]).fingerprint


def test_the_benchmark_loads_it_and_refuses_what_would_leave_it_out(chat_folder, pair, tmp_path, capsys):
    measure = ["bench", "--adapter-path", str(pair[0]), "-p", "4", "-g", "1", "-n", "1", "--json", str(tmp_path / "x")]
    assert main([*measure, "--model", str(chat_folder)]) == 0
    assert f"{chat_folder} with a" in (tmp_path / "x").read_text()
    for other in (["--random", "mini"], ["--vs", "mlx-lm"]):
        capsys.readouterr()
        assert main([*measure, *other]) == 2
        assert f"--adapter-path does not work with {' '.join(other)}" in capsys.readouterr().err


def test_an_adapter_of_nonsense_ends_in_a_line(chat_folder, pair, tmp_path, capsys):
    tensors = mx.load(str(pair[0] / "adapters.safetensors"))
    folder = save(tmp_path / "a", {name: t * float("nan") for name, t in tensors.items()})
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", str(folder), "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ring-mlx: [model] ")
    assert err.count("\n") == 1


# Folders that are none, or not for this model.


def damaged_file(folder):
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def fifo(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def settings(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensor(change):
    def rewrite(folder):
        file = str(folder / "adapters.safetensors")
        tensors = dict(mx.load(file))
        change(tensors)
        mx.save_safetensors(file, tensors)

    return rewrite


def foreign(folder):
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")


DENSE = f"{SOFTMAX}.attention.dense"
BAD = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no tensors": (lambda f: (f / "adapters.safetensors").unlink(), "no adapters.safetensors"),
    "PEFT": (foreign, "PEFT's are not read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not an object"),
    "config is a FIFO": (fifo("adapter_config.json"), "a FIFO"),
    "tensors are a FIFO": (fifo("adapters.safetensors"), "a FIFO"),
    "truncated": (damaged_file, "truncated or damaged"),
    "empty": (tensor(dict.clear), "holds no tensors"),
    "unknown kind": (settings(fine_tune_type="magic"), "fine_tune_type 'magic'"),
    "kind is no text": (settings(fine_tune_type=["lora"]), "fine_tune_type"),
    "no parameters": (settings(lora_parameters=None), "rank null"),
    "parameters are a list": (settings(lora_parameters=[1]), "rank null"),
    "alpha": (settings(lora_parameters={"rank": RANK, "alpha": 2}), "scale null"),
    "rank 0": (settings(lora_parameters={"rank": 0, "scale": 1}), "rank 0"),
    "rank true": (settings(lora_parameters={"rank": True, "scale": 1}), "rank true"),
    "huge rank": (settings(lora_parameters={"rank": 10**90, "scale": 1}), "misshapen"),
    "scale NaN": (settings(lora_parameters={"rank": RANK, "scale": float("nan")}), "scale NaN"),
    "scale infinite": (settings(lora_parameters={"rank": RANK, "scale": float("inf")}), "scale Infinity"),
    "scale text": (settings(lora_parameters={"rank": RANK, "scale": "2"}), "scale '2'"),
    "other rank": (settings(lora_parameters={"rank": RANK + 1, "scale": 1}), "misshapen"),
    "unknown layer": (tensor(lambda t: t.update({"model.layers.99.mlp.x.lora_a": mx.zeros((2, 2))})), "unknown"),
    "a norm": (tensor(lambda t: t.update({f"{LINEAR}.input_layernorm.lora_a": mx.zeros((48, RANK))})), "unknown"),
    "the model itself": (tensor(lambda t: t.update({"lora_a": mx.zeros((48, RANK))})), "unknown"),
    "an odd leaf": (tensor(lambda t: t.update({f"{DENSE}.lora_c": mx.zeros((2, 2))})), "unknown"),
    "half a pair": (tensor(lambda t: t.pop(f"{DENSE}.lora_b")), "missing"),
    "misshapen": (tensor(lambda t: t.update({f"{DENSE}.lora_b": mx.zeros((RANK, 7))})), "misshapen"),
    "integers": (tensor(lambda t: t.update({f"{DENSE}.lora_b": t[f"{DENSE}.lora_b"].astype(mx.int32)})), "no floats"),
    "DoRA without m": (settings(fine_tune_type="dora"), "missing"),
    "whole, but LoRA": (settings(fine_tune_type="full"), "unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_ends_in_a_line(chat_folder, pair, tmp_path, capsys, case):
    change, match = BAD[case]
    folder = save(tmp_path / "a", mx.load(str(pair[0] / "adapters.safetensors")))
    change(folder)
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", str(folder), "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("ring-mlx: [weights] ")
    assert match in err
    assert len(err) < 1500


@pytest.mark.parametrize("path", ["./nowhere", "", "~nobody-here/x", "a" * 5000, "/dev/null"])
def test_a_path_that_is_no_folder(chat_folder, capsys, path):
    assert main(["generate", "--model", str(chat_folder), "--adapter-path", path, "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no adapter_config.json" in err


def test_experts_on_disk_have_no_adapter(chat_folder, pair, tmp_path):
    model = load_model(chat_folder)
    for kind in ("experts", "router", "shared expert"):
        folder, merged = adapter(tmp_path / kind, model, PLACES[kind])
        if kind == "experts":
            with pytest.raises(RingError, match="changes routed experts, which --expert-cache-bytes"):
                load_model(chat_folder, adapter_path=folder, expert_cache_bytes=1 << 20)
            continue
        found = load_model(chat_folder, adapter_path=folder, expert_cache_bytes=1 << 20)
        assert_close(said(found), said(with_weights(load_model(chat_folder), merged)), 1e-5)
