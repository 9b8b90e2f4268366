"""mlx-lm's loader on our model, what it would compute without it, and training."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils
from mlx_lm.models import bailing_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import ring_mlx
from metal_kernels import launch
from ring_mlx import demo_model_path, load, load_model, mlx_lm_plugin
from ring_mlx.errors import ConfigError, WeightsError
from ring_mlx.mlx_lm_plugin import architecture
from ring_mlx.model.decode_step import DecodeStep
from ring_mlx.model.moe import MoE
from tests import foreign
from tests.compare import assert_close, relative_rms
from tests.through_mlx_lm import build
from tests.tiny import GOLDENS, config, save_hf, softmax_config, tokens

pytestmark = pytest.mark.usefixtures("registered")


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


def test_a_script_registers_in_one_line_before_or_after_it_imports_mlx_lm():
    mlx_lm_plugin.unregister()
    loader = mlx_lm.load  # as a script has it that imports mlx-lm first
    ring_mlx.register()
    ring_mlx.register()
    model, tokenizer = loader(str(demo_model_path()))
    assert type(model) is architecture.Model
    assert mlx_lm.generate(model, tokenizer, "2 + 3 =", max_tokens=1) is not None
    mlx_lm_plugin.unregister()
    assert "mlx_lm.models.ring_linear" not in sys.modules


def test_the_line_itself_imports_nothing_heavy():
    script = (
        "import sys, ring_mlx; ring_mlx.register; print([m for m in ('mlx', 'mlx_lm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_stock_mlx_lm_computes_something_else(tmp_path):
    raw = config(hidden_size=96, head_dim=16)  # head_dim = hidden / heads, which stock mlx-lm takes for granted
    model = save_hf(tmp_path, raw)
    ids = tokens(100)
    assert_close(build(tmp_path)(ids), model(ids), 1e-5)
    mlx_lm_plugin.unregister()
    stock = build(tmp_path)
    assert type(stock).__module__ == "mlx_lm.models.bailing_moe_linear"
    assert relative_rms(stock(ids), model(ids)) > 0.05


def test_the_key_of_the_decay_counts_and_clamped_is_what_stock_mlx_lm_computes(tmp_path):
    raw, ids, heard = config(hidden_size=96, head_dim=16), tokens(100), {}
    for offset in (0, -1, "clamped"):
        model = save_hf(tmp_path, raw | {"decay_layer_offset": offset})
        heard[offset] = model(ids)
        assert_close(build(tmp_path)(ids), heard[offset], 1e-5)
    assert relative_rms(heard[0], heard["clamped"]) > 0.05 < relative_rms(heard[0], heard[-1])
    assert relative_rms(heard[-1], heard["clamped"]) > 1e-3
    mlx_lm_plugin.unregister()
    assert_close(build(tmp_path)(ids), heard["clamped"], 1e-4)


def test_both_forms_of_checkpoint_and_the_quantized_demo_model_load_as_ours_do(tmp_path):
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
    extra = {
        "model.mtp.w": mx.zeros(30_000),
        "model.layers.9.w": mx.zeros(1),
        "model.layers.0.attention.slope": mx.zeros(1),
    }
    router = {"model.layers.1.mlp.gate.weight": mx.zeros((2, 2), mx.bfloat16)}
    found = model.sanitize(arrays | extra | router)
    assert sorted(found) == ["model.layers.1.mlp.gate.gate_proj.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"]
    assert found["model.layers.1.mlp.switch_mlp.up_proj.weight"][:, 0, 0].tolist() == list(range(12))
    assert found["model.layers.1.mlp.gate.gate_proj.weight"].dtype == mx.float32
    assert sorted(model.sanitize(found | extra)) == sorted(found)
    del arrays[expert.format(4)]
    with pytest.raises(WeightsError, match=r"should stack experts 0 to 11, but lacks 4"):
        model.sanitize(arrays | extra)


def test_the_router_is_neither_quantized_nor_cast():
    model = architecture.Model(architecture.ModelArgs.from_dict(foreign.shape()))
    _, quantized = utils.quantize_model(model, {}, 64, 4)
    names = {path for path, m in model.named_modules() if hasattr(m, "bits")}
    assert {"lm_head", "model.word_embeddings", "model.layers.1.mlp.switch_mlp.up_proj"} <= names
    assert not any("gate.gate_proj" in n for n in names)
    assert quantized["quantization"]["bits"] == 4
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
    monkeypatch.setattr(architecture, "settle", tried.append)
    monkeypatch.setattr("ring_mlx.model.model.Model.__call__", lambda *_, **__: None)
    model(tokens(5))
    with launch.use(launch.Backend("simulator", refuse)):
        model.train()
        model(tokens(5))
        model.eval()
    assert tried == []
    with launch.use(launch.Backend("simulator", refuse)):
        model(tokens(5))
        model(tokens(5))
    assert tried == [model, model]  # the kernels, then what this machine chose


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
