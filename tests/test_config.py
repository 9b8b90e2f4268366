"""config.json: what is needed, what is refused, what is ignored."""

from __future__ import annotations

import warnings

import pytest

import ring_mlx.model.config as module
from ring_mlx.errors import ConfigError
from ring_mlx.model.config import RingConfig, read_config
from tests.tiny import GOLDENS, config, softmax_config

OPTIONAL = {
    "decay_layer_offset",
    "head_dim",
    "moe_shared_expert_intermediate_size",
    "rope_scaling",
    "eos_token_id",
    "torch_dtype",
    "architectures",
}


@pytest.mark.parametrize("key", sorted(set(config()) - OPTIONAL))
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=rf"\[config\] config.json lacks .*\b{key}\b"):
        RingConfig.from_dict(config(**{key: ...}))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("linear_silu", True, "linear_silu true"),
        ("score_function", "softmax", "score_function 'softmax'"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("use_rmsnorm", False, "use_rmsnorm false"),
        ("norm_head", True, "norm_head true"),
        ("use_sliding_window", True, "use_sliding_window true"),
        ("model_type", "llama", "model_type 'llama'"),
        ("rope_scaling", {"type": "longrope", "factor": 2}, "rope_scaling type 'longrope'"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2}, "rope_scaling type 'dynamic'"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "attention_factor": 0}, "attention_factor 0 is not a positive"),
        ("rope_scaling", {"type": "yarn", "factor": float("nan")}, "factor NaN is not a positive number"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "attention_factor": "1"}, "attention_factor '1' is not a"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling factor null"),
        ("rope_scaling", "yarn", "rope_scaling 'yarn'"),
        ("hidden_size", "64", "hidden_size '64'"),
        ("hidden_size", -64, "hidden_size -64"),
        ("num_hidden_layers", 2.5, "num_hidden_layers 2.5"),
        ("use_qk_norm", 1, "use_qk_norm 1"),
        ("num_key_value_heads", 4, "num_key_value_heads 4 does not divide"),
        ("group_norm_size", 7, "group_norm_size 7 does not divide"),
        ("n_group", 5, "n_group 5 does not divide"),
        ("num_experts_per_tok", 7, "num_experts_per_tok 7 cannot be chosen"),
        ("topk_group", 9, "topk_group 9"),
        ("partial_rotary_factor", 0.35, "does not give an even number"),
        ("partial_rotary_factor", 1.5, "partial_rotary_factor 1.5"),
        ("rotary_dim", 4, "rotary_dim 4 contradicts"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps NaN"),
        *(("decay_layer_offset", value, "decay_layer_offset") for value in (1, -2, -1.0, True, "0", "", [], {})),
        ("decay_layer_offset", "Clamped", "decay_layer_offset 'Clamped' is not 0 or -1 or 'clamped'; correct"),
    ],
)
def test_an_unsupported_value_is_named(key, value, shown):
    with pytest.raises(ConfigError) as e:
        RingConfig.from_dict(config(**{key: value}))
    assert shown in str(e.value)
    assert "\n" not in str(e.value)


def test_defaults_that_the_format_defines():
    c = RingConfig.from_dict(config(head_dim=..., moe_shared_expert_intermediate_size=...))
    assert (c.head_dim, c.moe_shared_expert_intermediate_size) == (8, 32)
    assert (c.use_bias, c.use_qkv_bias, c.tie_word_embeddings, c.rope_scaling) == (False, False, False, None)


def test_rotary_dim_serves_for_the_factor():
    assert RingConfig.from_dict(config(partial_rotary_factor=..., rotary_dim=4)).rope_dims == 4
    assert RingConfig.from_dict(config(rotary_dim=8)).rope_dims == 8


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def test_rope_parameters_of_newer_files():
    rope = {"rope_theta": 6e5, "rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}
    c = RingConfig.from_dict(config(rope_theta=..., rope_scaling=..., partial_rotary_factor=..., rope_parameters=rope))
    assert (c.rope_theta, c.rope_dims) == (6e5, 8)
    assert c.rope_scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (YARN | {"attn_factor": 1.0}, "key 'attn_factor' is not supported"),
        (YARN | {"truncate": False}, "key 'truncate' is not supported"),
        ({"rope_type": "default", "attention_factor": 1.0}, "'attention_factor' .* the type default"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 2.0}, "'mscale' is not supported with the type linear"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 2.0}, "'beta_fast' is not supported with the type linear"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "type 'llama3' is not supported, only"),
        ({"type": "longrope", "short_factor": [1.0]}, "type 'longrope' is not supported, only"),
        ({"full_attention": {"rope_type": "default"}}, "'full_attention'"),
        ({"factor": 4.0}, "factor 4.0 is of no type"),
        (YARN | {"type": "linear"}, "type '(linear|yarn)' in rope_.* contradicts '(linear|yarn)'"),
        (YARN | {"rope_theta": 6e5}, "rope_theta 600000.0 in rope_.* contradicts 10000 in config.json"),
        (YARN | {"partial_rotary_factor": 1.0}, "partial_rotary_factor 1.0 in rope_.* contradicts 0.5"),
        ([YARN], "is not an object"),
        (YARN | {"original_max_position_embeddings": 1 << 30}, "beyond"),
    ],
)
def test_a_key_of_the_rotation_is_honoured_or_refused_in_both_spellings(place, rope, said):
    with pytest.raises(ConfigError, match=said) as e:
        RingConfig.from_dict(config(**{"rope_scaling": ..., place: rope}))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("key", "value"), [("factor", 2.0), ("rope_type", "linear"), ("rope_theta", 2.0)])
def test_spellings_that_contradict_each_other(key, value):
    raw = config(rope_theta=..., rope_scaling=YARN, rope_parameters=YARN | {"rope_theta": 10000.0, key: value})
    if key == "rope_theta":
        raw["rope_theta"] = 10000
    with pytest.raises(ConfigError, match=r"contradicts .*; remove the wrong one"):
        RingConfig.from_dict(raw)


def test_what_is_said_twice_alike_is_taken_and_null_is_absent():
    nulls = dict.fromkeys(("attention_factor", "beta_fast", "surprise", "type"))
    rope = YARN | nulls | {"rope_theta": 10000.0, "truncate": True}
    plain = RingConfig.from_dict(config(rope_scaling=YARN))
    for changes in ({"rope_scaling": None}, {"rope_scaling": YARN}, {"rope_theta": None}, {"rope_theta": 10000}):
        assert RingConfig.from_dict(config(rope_parameters=rope) | changes) == plain
    assert RingConfig.from_dict(config(rope_parameters=None)) == RingConfig.from_dict(config())


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 512),
        ({"type": "default", "factor": 1}, 512),
        ({"type": "yarn", "factor": 4.0}, 2048),
        ({"type": "linear", "factor": 4.0}, 2048),
        (YARN, 1024),
        (YARN | {"original_max_position_embeddings": 64}, 512),
        (YARN | {"factor": 2.3, "original_max_position_embeddings": 1000}, 2300),
    ],
)
def test_the_context_is_lengthened_by_the_factor(scaling, context):
    assert RingConfig.from_dict(config(rope_scaling=scaling)).context_tokens == context


def test_softmax_siblings_need_no_groups_of_layers():
    c = RingConfig.from_dict(softmax_config())
    assert not any(c.is_linear(i) for i in range(5))


def test_ling_1_is_refused():
    with pytest.raises(ConfigError, match="Ling 1"):
        RingConfig.from_dict(config(model_type="bailing_moe", n_group=...))


def test_unknown_keys_are_warned_about_once_and_harmless_ones_never(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    with pytest.warns(UserWarning, match="unknown keys in config.json are ignored: surprise, twist"):
        RingConfig.from_dict(config(surprise=1, twist=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RingConfig.from_dict(config(surprise=1, transformers_version="5", num_nextn_predict_layers=1))


def test_goldens_load_without_a_warning():
    for name in ("mini_like", "flash_like"):
        config_, raw = read_config(GOLDENS / name)
        assert config_.model_type == raw["model_type"] == "bailing_moe_linear"


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        RingConfig.from_dict(config()).hidden_size = 3
