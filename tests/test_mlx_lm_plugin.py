"""mlx-lm's own commands and batch generator on our model, and what it would compute without it."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from importlib.machinery import ModuleSpec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import bailing_moe
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.perplexity import load_data
from mlx_lm.tuner.utils import linear_to_lora_layers

from metal_kernels import launch
from ring_mlx import demo_model_path, load, load_model, mlx_lm_plugin
from ring_mlx.cli import main
from ring_mlx.decode_step import DecodeStep
from ring_mlx.errors import ConfigError, OptionError, WeightsError
from ring_mlx.evaluation.scoring import token_nats
from ring_mlx.mlx_lm_plugin import architecture
from ring_mlx.model import DecoderLayer
from ring_mlx.moe import MoE
from tests import foreign
from tests.compare import assert_close, relative_rms
from tests.conftest import TOKENIZER_FILES
from tests.tiny import GOLDENS, config, save_hf, softmax_config, tokens

ROOT = Path(__file__).parent.parent
LENGTHS = (1, 2, 63, 64, 65, 130, 7)


@pytest.fixture(autouse=True)
def registered():
    mlx_lm_plugin.register()
    yield
    mlx_lm_plugin.unregister()


@pytest.fixture
def command(capsys):
    """Runs a command of mlx-lm through ours; returns exit code, standard output and standard error."""

    def call(*args):
        code = main(["mlx-lm", *map(str, args)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def to_float32(model):
    floats = tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    model.update(floats)
    return model


def build(folder):
    """mlx-lm's own loader."""
    return to_float32(utils.load_model(folder)[0])


# What mlx-lm builds.


@pytest.mark.parametrize("name", ["mini_like", "flash_like"])
def test_logits_are_the_goldens(name):
    golden = mx.load(str(GOLDENS / name / "golden.safetensors"))
    model = build(GOLDENS / name)
    assert type(model) is architecture.Model
    assert_close(model(golden["tokens"][None])[0], golden["logits"], 1e-4)
    cache = make_prompt_cache(model)
    parts = [model(golden["tokens"][None, a:b], cache=cache) for a, b in ((0, 1), (1, 66), (66, 67), (67, 10_000))]
    assert_close(mx.concatenate(parts, axis=1)[0], golden["logits"], 1e-4)


@pytest.mark.parametrize("name", ["mini_like", "flash_like"])
def test_stock_mlx_lm_cannot_even_load_the_goldens(name):
    mlx_lm_plugin.unregister()
    with pytest.raises(ValueError, match="Expected shape"):
        utils.load_model(GOLDENS / name)


def test_stock_mlx_lm_computes_something_else(tmp_path):
    raw = config(hidden_size=96, head_dim=16)  # head_dim = hidden / heads, which stock mlx-lm takes for granted
    model = save_hf(tmp_path, raw)
    ids = tokens(100)
    assert_close(build(tmp_path)(ids), model(ids), 1e-5)
    mlx_lm_plugin.unregister()
    stock = build(tmp_path)
    assert type(stock).__module__ == "mlx_lm.models.bailing_moe_linear"
    assert relative_rms(stock(ids), model(ids)) > 0.05


def test_both_forms_of_checkpoint_and_the_quantised_demo_model_load_as_ours_do(tmp_path):
    model = save_hf(tmp_path / "hf", config(), shards=3)
    utils.save_model(tmp_path / "stacked", model)
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "stacked")
    ids = tokens(20)
    for folder in (tmp_path / "hf", tmp_path / "stacked"):
        assert_close(build(folder)(ids), model(ids), 1e-6)
    assert_close(build(demo_model_path())(ids), load_model(demo_model_path(), dtype=mx.float32)(ids), 1e-5)


def test_a_router_in_eight_bits_as_mlx_community_has_it(tmp_path):
    save_hf(tmp_path / "float", foreign.shape())
    model, raw = utils.load_model(tmp_path / "float")
    eight = {"group_size": 64, "bits": 8}
    _, raw = utils.quantize_model(
        model, raw, 64, 4, quant_predicate=lambda path, _: eight if path.endswith("gate.gate_proj") else True
    )
    utils.save_model(tmp_path / "q", model)
    (tmp_path / "q" / "config.json").write_text(json.dumps(raw))
    found = build(tmp_path / "q")
    assert found.layers[1].mlp.gate.gate_proj.bits == 8
    assert_close(found(tokens(20)), load_model(tmp_path / "q", dtype=mx.float32)(tokens(20)), 1e-5)


def test_names_that_are_not_ours_are_left_out_and_experts_must_be_complete():
    model = architecture.Model(architecture.ModelArgs.from_dict(config()))
    expert = "model.layers.1.mlp.experts.{}.up_proj.weight"
    arrays = {expert.format(e): mx.full((2, 3), e, mx.bfloat16) for e in range(12)}
    extra = {"model.mtp.w": mx.zeros(1), "model.layers.9.w": mx.zeros(1), "model.layers.0.attention.slope": mx.zeros(1)}
    router = {"model.layers.1.mlp.gate.weight": mx.zeros((2, 2), mx.bfloat16)}
    found = model.sanitize(arrays | extra | router)
    assert sorted(found) == ["model.layers.1.mlp.gate.gate_proj.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"]
    assert found["model.layers.1.mlp.switch_mlp.up_proj.weight"][:, 0, 0].tolist() == list(range(12))
    assert found["model.layers.1.mlp.gate.gate_proj.weight"].dtype == mx.float32
    assert sorted(model.sanitize(found)) == sorted(found)
    del arrays[expert.format(4)]
    with pytest.raises(WeightsError, match=r"experts 0 to 11, but the files hold 11"):
        model.sanitize(arrays)


def test_the_router_is_neither_quantised_nor_cast():
    model = architecture.Model(architecture.ModelArgs.from_dict(foreign.shape()))
    _, quantised = utils.quantize_model(model, {}, 64, 4)
    names = {path for path, m in model.named_modules() if hasattr(m, "bits")}
    assert {"lm_head", "model.word_embeddings", "model.layers.1.mlp.switch_mlp.up_proj"} <= names
    assert not any("gate.gate_proj" in n for n in names)
    assert quantised["quantization"]["bits"] == 4
    kept = [n for n, _ in tree_flatten(model.parameters()) if not model.cast_predicate(n)]
    assert sorted(kept) == [
        f"model.layers.{i}.mlp.gate.{n}" for i in (1, 2) for n in ("expert_bias", "gate_proj.weight")
    ]


@pytest.mark.parametrize(
    ("raw", "ours"),
    [
        (config(), True),
        (softmax_config(), True),
        (softmax_config() | {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"]}, True),
        (softmax_config() | {"model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"]}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_which_models_are_ours(raw, ours):
    assert (utils._get_classes(raw)[0] is architecture.Model) == ours


def test_the_softmax_sibling_loads(tmp_path):
    model = save_hf(tmp_path, softmax_config())
    assert_close(build(tmp_path)(tokens(9)), model(tokens(9)), 1e-6)


def test_register_twice_and_take_it_back():
    mlx_lm_plugin.register()
    assert importlib.import_module(mlx_lm_plugin.MODULE) is architecture
    assert importlib.import_module("mlx_lm.models.bailing_moe_linear").Model is not architecture.Model
    mlx_lm_plugin.unregister()
    assert mlx_lm_plugin.MODULE not in sys.modules
    assert "bailing_moe_linear" not in utils.MODEL_REMAPPING
    assert utils._load_tokenizer.__module__ == "mlx_lm.tokenizer_utils"
    assert utils._get_classes({"model_type": "bailing_moe"})[0] is bailing_moe.Model


def test_packed_forms_that_are_not_mlxs_are_refused():
    with pytest.raises(WeightsError, match=r"'gptq' cannot be loaded .* ring-mlx convert"):
        architecture.ModelArgs.from_dict(config(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ConfigError, match="lacks layer_group_size"):
        architecture.ModelArgs.from_dict(config(layer_group_size=...))


def test_the_tokenizer_stops_at_the_end_of_a_role_and_runs_no_code(tmp_path, monkeypatch):
    for file in demo_model_path().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_x.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked to run the checkpoint's code"))
    ids = utils.load_tokenizer(tmp_path).eos_token_ids
    assert ids == load(demo_model_path())[1].eos_token_ids
    assert len(ids) == 2
    raw["model_type"] = "llama"
    del raw["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert len(utils.load_tokenizer(tmp_path).eos_token_ids) == 1


# Batches.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_hf(folder, config())
    mlx_lm_plugin.register()
    return utils.load_model(folder)[0]


def prompt(n):
    return tokens(n, seed=n)[0].tolist()


def said_alone(model, ids, count):
    return [int(t) for t, _ in generate_step(mx.array(ids), model, max_tokens=count)]


def until_stop(tokenizer, said):
    ends = [i for i, t in enumerate(said) if t in tokenizer.eos_token_ids]
    return tokenizer.decode(said[: ends[0] if ends else None])


@pytest.fixture(scope="module")
def alone(tiny):
    return {n: said_alone(tiny, prompt(n), 24) for n in LENGTHS}


def drain(generator, said, caches):
    while found := generator.next_generated():
        for r in found:
            said.setdefault(r.uid, []).append(r.token)
            if r.finish_reason:
                caches[r.uid] = r.prompt_cache


@pytest.mark.parametrize(("step", "rows"), [(2048, 8), (32, 3)])
def test_a_batch_says_what_each_prompt_says_alone(tiny, alone, step, rows):
    """Lengths differ, rows end at different times, and with fewer places than prompts later ones join earlier ones."""
    generator = BatchGenerator(tiny, prefill_step_size=step, prefill_batch_size=rows, completion_batch_size=rows)
    counts = [5, 24, 11, 1, 17, 8, 24]
    uids = generator.insert([prompt(n) for n in LENGTHS], max_tokens=counts)
    said, caches = {}, {}
    drain(generator, said, caches)
    for uid, n, count in zip(uids, LENGTHS, counts, strict=True):
        assert said[uid] == alone[n][:count]
    # What a row leaves behind goes on alone and in another batch, beside a new prompt.
    for n, count in ((65, 17), (130, 8), (1, 5)):
        uid = uids[LENGTHS.index(n)]
        again = BatchGenerator(tiny)
        old, new = again.insert([[3, 4], prompt(63)], max_tokens=[6, 9], caches=[caches[uid], None])
        found = {}
        drain(again, found, {})
        assert found[old] == said_alone(tiny, [*prompt(n), *alone[n][:count], 3, 4], 6)
        assert found[new] == alone[63][:9]


def test_a_row_may_be_removed_and_another_join_in_between(tiny, alone):
    generator, said = BatchGenerator(tiny, prefill_step_size=16), {}
    first = generator.insert([prompt(65), prompt(7)], max_tokens=[24, 24])
    for _ in range(4):
        for r in generator.next_generated():
            said.setdefault(r.uid, []).append(r.token)
    kept = generator.remove([first[1]], return_prompt_caches=True)[first[1]][0]
    late = generator.insert([prompt(130)], max_tokens=[10])
    drain(generator, said, {})
    assert said[first[0]] == alone[65]
    assert said[late[0]] == alone[130][:10]
    assert said[first[1]] == alone[7][: len(said[first[1]])]
    seen = kept[-1].offset
    whole = [*prompt(7), *alone[7]]
    logits = tiny(mx.array([whole[seen : seen + 1]]), cache=kept)
    assert_close(logits[:, -1], tiny(mx.array([whole[: seen + 1]]))[:, -1], 1e-4)


def merged(model, lengths):
    """The batch cache of prompts that were read alone, and a cache of each."""
    caches = []
    for n in lengths:
        cache = make_prompt_cache(model)
        if n:
            model(mx.array([prompt(n)]), cache=cache)
        caches.append(cache)
    return [parts[0].merge(list(parts)) for parts in zip(*caches, strict=True)]


def expected(model, lengths, more):
    return mx.concatenate([model(mx.array([prompt(n) * bool(n) + more]))[:, -1] for n in lengths])


def read(model, cache, more, rows):
    return model(mx.array([more] * rows), cache=cache)[:, -1]


@pytest.mark.parametrize("more", [[9], [9, 8, 7]])
def test_each_operation_of_a_batch_cache(tiny, more):
    cache = merged(tiny, [7, 65, 0, 2])
    assert_close(read(tiny, cache, more, 4), expected(tiny, [7, 65, 0, 2], more), 1e-4)
    cache = merged(tiny, [7, 65, 0, 2])
    for c, other in zip(cache, merged(tiny, [130, 0]), strict=True):
        c.extend(other)
    for c in cache:
        c.filter([0, 2, 3, 4, 5])
    rows = [7, 0, 2, 130, 0]
    assert_close(read(tiny, cache, more, 5), expected(tiny, rows, more), 1e-4)
    for row in (0, 1, 3):
        one = [c.extract(row) for c in cache]
        assert_close(read(tiny, one, [5], 1), expected(tiny, rows[row : row + 1], [*more, 5]), 1e-4)
    cache = merged(tiny, [7, 65])
    for c in cache:
        c.filter([0])
    assert_close(read(tiny, cache, more, 1), expected(tiny, [7], more), 1e-4)


@pytest.mark.parametrize("step", [2, 3, 100])
def test_right_padding_neither_enters_nor_decays_a_state(tiny, step):
    rows = [[5], [6, 7, 8, 9, 4], [6, 7, 1]]
    cache = merged(tiny, [7, 0, 65])
    for c in cache:
        c.prepare(lengths=[1, 5, 3], right_padding=[4, 0, 2])
    ids = mx.array([r + [0] * (5 - len(r)) for r in rows])
    for at in range(0, 5, step):
        tiny(ids[:, at : at + step], cache=cache)
    for c in cache:
        c.finalize()
    whole = [[*prompt(7), *rows[0]], rows[1], [*prompt(65), *rows[2]]]
    right = mx.concatenate([tiny(mx.array([[*w, 9]]))[:, -1] for w in whole])
    assert_close(read(tiny, cache, [9], 3), right, 1e-4)


def test_padding_is_forgotten_once_it_has_been_read(tiny):
    cache, alone_cache = merged(tiny, [0, 0]), make_prompt_cache(tiny)
    rows, single = mx.array([[0, 0, 5], [1, 2, 3]]), mx.array([[5]])
    for c in cache:
        c.left_padding = mx.array([2, 0])
        if not hasattr(c, "advance"):
            c.offset = mx.array([-2, 0])
    tiny(rows[:, :1], cache=cache)
    for at in (1, 2):
        assert cache[0].left_padding is not None
        logits = tiny(rows[:, at : at + 1], cache=cache)
    assert_close(logits[:1, -1], tiny(single, cache=alone_cache)[:, -1], 1e-4)
    logits = tiny(mx.array([[6], [6]]), cache=cache)
    assert all(c.left_padding is None for c in cache if hasattr(c, "advance"))
    assert_close(logits[:1, -1], tiny(mx.array([[6]]), cache=alone_cache)[:, -1], 1e-4)


@pytest.mark.parametrize("lengths", [[64], [64, 64], [7, 65]])
def test_a_batch_takes_the_compiled_step(tiny, alone, monkeypatch, lengths):
    taken = []
    run = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *a: taken.append(1) or run(self, *a))
    monkeypatch.setattr("ring_mlx.model.is_worthwhile", lambda: True)  # as on a GPU
    monkeypatch.setattr(tiny.model, "_step", None)
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)
    generator, said = BatchGenerator(tiny), {}
    uids = generator.insert([prompt(n) for n in lengths], max_tokens=[9] * len(lengths))
    drain(generator, said, {})
    assert [said[u] for u in uids] == [alone[n][:9] for n in lengths]
    assert len(taken) >= 9
    tiny.model._step = None


def test_a_prompt_cache_file(tiny, tmp_path):
    cache = make_prompt_cache(tiny)
    tiny(mx.array([prompt(65)]), cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache, {"model": "x"})
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert loaded[0][0].dtype == mx.float32
    assert mx.array_equal(read(tiny, loaded, [9], 1), read(tiny, cache, [9], 1))


# Training.


def loss(model, ids):
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()


def test_gradients_are_those_of_differences(tmp_path):
    save_hf(tmp_path, config(topk_group=4, num_experts_per_tok=12))  # all experts, since a choice has no slope
    model = utils.load_model(tmp_path)[0]
    model.train()
    ids = tokens(70, B=2)
    grads = dict(tree_flatten(nn.value_and_grad(model, loss)(model, ids)[1]))
    for part in (
        "0.attention.query_key_value",
        "0.attention.g_norm",
        "1.mlp.gate.gate_proj",
        "1.mlp.switch_mlp.up_proj",
    ):
        name = f"model.layers.{part}.weight"
        norm, before = mx.linalg.norm(grads[name]), dict(tree_flatten(model.parameters()))[name]
        ends, step = [], 5e-3
        for sign in (1, -1):
            model.load_weights([(name, before + sign * step * grads[name] / norm)], strict=False)
            ends.append(loss(model, ids).item())
        model.load_weights([(name, before)], strict=False)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm.item(), rel=0.01), name


def refuse(*_, **__):
    raise AssertionError("a kernel was built")


def test_training_runs_no_kernel_and_adapted_experts_none_of_theirs(tmp_path):
    save_hf(tmp_path, config())
    model = utils.load_model(tmp_path)[0]
    plain = model(tokens(5))
    with launch.use(launch.Backend("simulator", refuse)):
        model.train()
        assert_close(model(tokens(5)), plain, 1e-6)
    blocks = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    assert all(block.weights() is not None for block in blocks)
    linear_to_lora_layers(model, 5, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    assert all(block.weights() is None for block in blocks)


def test_the_first_call_tries_the_kernels(tmp_path, monkeypatch):
    save_hf(tmp_path, config())
    model = utils.load_model(tmp_path)[0]
    tried = []
    monkeypatch.setattr(architecture, "check_kernels", tried.append)
    monkeypatch.setattr("ring_mlx.model.Model.__call__", lambda *_, **__: None)
    model(tokens(5))
    with launch.use(launch.Backend("simulator", refuse)):
        model.train()
        model(tokens(5))
        model.eval()
    assert tried == []
    with launch.use(launch.Backend("simulator", refuse)):
        model(tokens(5))
        model(tokens(5))
    assert tried == [model]


def test_a_copy_goes_its_own_way_also_after_a_compiled_step(tmp_path):
    save_hf(tmp_path, config())
    model = utils.load_model(tmp_path)[0]
    model.freeze()
    model.model._step, before = DecodeStep(model.layers), model(tokens(5))
    twin = copy.deepcopy(model)
    assert_close(twin(tokens(5)), before, 1e-6)
    assert (type(twin), twin.training) == (architecture.Model, False)
    assert not tree_flatten(twin.trainable_parameters())
    twin.update(tree_map(lambda x: 2 * x, twin.parameters()))
    assert relative_rms(twin(tokens(5)), before) > 0.1
    assert_close(model(tokens(5)), before, 1e-6)


# The commands.


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with train, valid and test files."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": f"The sum of {i} and {i + 1} is {2 * i + 1}. " * (1 + i % 2)}) for i in range(8)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def datasets(texts, monkeypatch):
    """The `datasets` package, as far as mlx-lm calls it to load a file by name."""

    def load_dataset(path, split, **_):
        assert split.startswith("train")
        return [json.loads(line) for line in (texts.parent / path / "train.jsonl").read_text().splitlines()]

    module = types.ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 checkpoint whose rows divide into groups of 64, with the demo tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    save_hf(folder, foreign.shape(vocab_size=1024, eos_token_id=1))
    for name in TOKENIZER_FILES:
        shutil.copy(demo_model_path() / name, folder)
    return folder


def test_generate(command):
    code, out, _ = command("generate", "--model", demo_model_path(), "--prompt", "What is 2 + 3?", "-m", 60)
    assert code == 0
    text = out.split("=" * 10 + "\n")[1]
    model, tokenizer = load(demo_model_path())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], add_generation_prompt=True)
    assert text.strip() == until_stop(tokenizer, said_alone(model, ids, 60)).strip()


def test_cache_prompt_and_generate_from_it(command, tmp_path):
    file = tmp_path / "prompt.safetensors"
    model = ("--model", demo_model_path())
    assert command("cache_prompt", *model, "--prompt", "Be brief. ", "--prompt-cache-file", file)[0] == 0
    code, out, _ = command("generate", "--prompt-cache-file", file, "--prompt", "What is 2 + 3?", "-m", 10)
    assert code == 0
    whole, tokenizer = load(demo_model_path())
    start, end = (
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, **options)
        for text, options in (
            ("Be brief. ", {"add_generation_prompt": False, "continue_final_message": True}),
            ("<query>", {"add_generation_prompt": True}),
        )
    )
    rest = end[end.index("<query>") :].replace("<query>", "What is 2 + 3?")
    ids = [i for part in (start, rest) for i in tokenizer.encode(part, add_special_tokens=False)]
    right = until_stop(tokenizer, said_alone(whole, ids, 10))
    assert out.split("=" * 10 + "\n")[1].strip() == right.strip()


def test_perplexity(command, texts, datasets):
    options = ("--sequence-length", 16, "--num-samples", 4, "--batch-size", 2, "--data-path", texts.name)
    code, out, _ = command("perplexity", "--model", demo_model_path(), *options)
    assert code == 0
    found = float(out.partition("Perplexity: ")[2].split()[0])
    model, tokenizer = load(demo_model_path())
    np.random.seed(123)  # the command's own
    data = load_data(tokenizer, texts.name, 4, 16)
    assert data.shape == (4, 16)
    expected = math.exp(np.mean([token_nats(model, row, 1) for row in data.tolist()]))
    assert found == pytest.approx(expected, rel=1e-3)


def test_lora_with_checkpointing_then_generate_and_fuse(command, texts, chat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # --grad-checkpoint replaces it for good
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)  # MLX calls a C++ compiler on the CPU
    adapter = ("--adapter-path", tmp_path / "adapters")
    options = ("--data", texts, "--batch-size", 2, "--num-layers", 5, "--max-seq-length", 32, *adapter)
    learn = ("--train", "--iters", 2, "--learning-rate", "1e-2", "--val-batches", 1, "--steps-per-report", 1)
    code, out, _ = command("lora", "--model", chat_folder, *options, *learn, "--grad-checkpoint", "--test")
    assert code == 0
    assert "Test loss" in out
    changed = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert {"query_key_value", "g_proj", "dense", "gate_proj", "up_proj"} <= {n.split(".")[-2] for n in changed}
    learnt = [mx.abs(x).max().item() > 0 for n, x in changed.items() if n.endswith("lora_b")]
    assert all(learnt)
    code, adapted, _ = command("generate", "--model", chat_folder, *adapter, "--prompt", "one", "-m", 8)
    assert code == 0
    assert command("fuse", "--model", chat_folder, *adapter, "--save-path", tmp_path / "fused")[0] == 0
    code, fused, _ = command("generate", "--model", tmp_path / "fused", "--prompt", "one", "-m", 8)
    assert code == 0
    assert adapted.split("=" * 10)[1] == fused.split("=" * 10)[1]


def test_lora_lowers_the_loss_of_the_quantised_demo_model(command, texts, tmp_path):
    options = ("--data", texts, "--batch-size", 2, "--num-layers", 2, "--max-seq-length", 32)
    learn = ("--train", "--iters", 4, "--learning-rate", "1e-3", "--val-batches", 4, "--steps-per-eval", 4)
    code, out, _ = command(
        "lora", "--model", demo_model_path(), *options, *learn, "--adapter-path", tmp_path / "adapters"
    )
    assert code == 0
    first, last = (float(x) for x in re.findall(r"val ([0-9.]+)", re.sub(r"\x1b\[[0-9;]*m", "", out)))
    assert last < first / 2


def test_dwq(command, wide, texts, datasets, tmp_path):
    options = ("--mlx-path", tmp_path / "q", "--bits", 3, "--num-samples", 4, "--batch-size", 2)
    code, out, err = command(
        "dwq", "--model", wide, *options, "--max-seq-length", 33, "--data-path", texts.name, "--learning-rate", "1e-4"
    )
    assert code == 0
    losses = [float(line.rpartition("=")[2]) for line in (out + err).splitlines() if line.startswith("Validation")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    ids = tokens(20, vocab=1024)
    assert_close(build(tmp_path / "q")(ids), load_model(tmp_path / "q", dtype=mx.float32)(ids), 1e-4)


def test_convert(command, wide, tmp_path):
    assert command("convert", "--hf-path", wide, "--mlx-path", tmp_path / "q", "-q", "--q-bits", 4)[0] == 0
    names = mx.load(str(tmp_path / "q" / "model.safetensors"))
    router = "model.layers.1.mlp.gate.gate_proj"
    assert f"{router}.scales" not in names
    assert names[f"{router}.weight"].dtype == mx.float32
    ids = tokens(20, vocab=1024)
    assert_close(build(tmp_path / "q")(ids), load_model(tmp_path / "q", dtype=mx.float32)(ids), 1e-4)


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def lm_eval(monkeypatch):
    """The lm_eval package, as far as mlx_lm.evaluate touches it; its answers to three kinds of request are kept."""
    answers = {}

    def simple_evaluate(model, tasks, **_):
        answers["pairs"] = model.loglikelihood(
            [Request("2 + 3 =", " 5"), Request("2 + 3 =", " 6 and"), Request("a", "b")]
        )
        answers["whole"] = model.loglikelihood_rolling([Request("one two three"), Request("five")])
        options = {"until": ["\n\n"], "max_gen_toks": 6}
        answers["texts"] = model.generate_until([Request("What is 2 + 3?", options), Request("Why?", options)])
        answers["model"] = model
        return {"results": {task: {"acc": 1.0} for task in tasks}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    modules["lm_eval.api.registry"].register_model = lambda *_: lambda cls: cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0" if name == "lm_eval" else "1")
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield answers
    sys.modules.pop("mlx_lm.evaluate", None)


def test_evaluate(command, lm_eval, tmp_path):
    code, out, _ = command(
        "evaluate", "--model", demo_model_path(), "--tasks", "sums", "--output-dir", tmp_path, "--batch-size", 2
    )
    assert code == 0
    assert '"acc": 1.0' in out
    model, tokenizer = load(demo_model_path())

    def logprobs(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = nn.log_softmax(model(mx.array([ids])).astype(mx.float32))[0]
        return [found[i, t].item() for i, t in enumerate(ids[1:])]

    for (context, answer), (score, _) in zip(
        (("2 + 3 =", " 5"), ("2 + 3 =", " 6 and"), ("a", "b")), lm_eval["pairs"], strict=True
    ):
        start = len(tokenizer.encode(context, add_special_tokens=False)) - 1
        assert score == pytest.approx(sum(logprobs(context + answer)[start:]), rel=1e-3)
    for text, score in zip(("one two three", "five"), lm_eval["whole"], strict=True):
        assert score == pytest.approx(sum(logprobs(text)), rel=1e-3)
    for text, found in zip(("What is 2 + 3?", "Why?"), lm_eval["texts"], strict=True):
        said = said_alone(model, tokenizer.encode(text, add_special_tokens=False), 6)
        right = until_stop(tokenizer, said).split("\n\n")[0]
        assert found == right.rpartition(tokenizer.think_end)[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running ``python -m ring_mlx.mlx_lm_plugin server`` on the demo model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ring_mlx.mlx_lm_plugin",
                "server",
                "--model",
                demo_model_path(),
                "--port",
                str(port),
            ],
            stdout=out,
            stderr=out,
        )
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(address, route, **body):
    request = urllib.request.Request(address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_server_answers_several_at_once_as_one_by_one(server):
    model, tokenizer = load(demo_model_path())
    prompts = ["What is 2 + 3?", "one " * 40, "Why is it that"]
    found = [None] * len(prompts)

    def complete(i):
        found[i] = ask(server, "/v1/completions", prompt=prompts[i], max_tokens=10 + 4 * i, temperature=0)

    threads = [threading.Thread(target=complete, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, text in enumerate(prompts):
        right = until_stop(tokenizer, said_alone(model, tokenizer.encode(text), 10 + 4 * i))
        assert found[i]["choices"][0]["text"] == right.lstrip(" "), "the server strips spaces from the front only"


def test_server_keeps_what_it_has_read(server):
    messages = [{"role": "user", "content": "What is 27 + 35?"}]
    first = ask(server, "/v1/chat/completions", messages=messages, max_tokens=200, temperature=0)
    again = ask(server, "/v1/chat/completions", messages=messages, max_tokens=200, temperature=0)
    answer = first["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["reasoning"]
    assert "<" not in answer["message"]["content"]
    assert again["choices"][0]["message"] == answer["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# The door.


def test_a_command_that_mlx_lm_lacks(capsys):
    with pytest.raises(OptionError, match=r"no command 'sing'; give one of .*'lora'"):
        mlx_lm_plugin.run("sing", [])
    assert main(["mlx-lm", "sing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sys.argv[0] != "mlx_lm sing"


def test_every_command_is_in_the_documentation():
    with pytest.raises(OptionError) as e:
        mlx_lm_plugin.run("sing", [])
    text = (ROOT / "docs" / "mlx_lm.md").read_text(encoding="utf-8")
    commands = re.findall(r"'(\w+)'", str(e.value).partition("give one of")[2])
    assert len(commands) >= 17
    assert [c for c in commands if f"`{c}`" not in text] == []


def test_help_is_that_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["mlx-lm", "generate", "--help"])
    assert "--prompt-cache-file" in capsys.readouterr().out


def test_a_bad_config_is_one_line(tmp_path, capsys):
    save_hf(tmp_path, config())
    (tmp_path / "config.json").write_text(json.dumps(config(rope_theta=...)))
    assert main(["mlx-lm", "generate", "--model", str(tmp_path)]) == 2
    assert "[config] config.json lacks rope_theta" in capsys.readouterr().err
