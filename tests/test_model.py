"""The model beyond the goldens: siblings, tails, biases, ties, YaRN, head sizes, precision."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_kernels import dispatch, naive_lightning_attn
from ring_mlx.model.attention import LinearAttention, SoftmaxAttention, _rotation
from ring_mlx.model.config import RingConfig
from ring_mlx.model.decay import alibi_slopes, decay_rate
from ring_mlx.model.model import Model
from tests import reference
from tests.compare import assert_close, relative_rms, to_numpy
from tests.tiny import config, make_model, softmax_config, tokens


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 16, 20, 32, 40])
def test_slopes_are_alibis(heads):
    np.testing.assert_allclose(alibi_slopes(heads), reference.slopes(heads), rtol=1e-12)


@pytest.mark.parametrize(("offset", "first"), [(0, 0), (-1, -1), ("clamped", 0)])
def test_decay_rate_counts_layers_as_the_configuration_says(offset, first):
    slopes, behind = np.array(reference.slopes(16)), 0 if offset == 0 else 1
    for layer in (0, 1, 10, 18, 19):
        number = first if layer == 0 else layer - behind
        assert_close(decay_rate(16, layer, 20, offset), slopes * (1 - number / 19 + 1e-5), 1e-6)
    model = make_model(decay_layer_offset=offset)
    for layer in (0, 1):
        assert mx.array_equal(model.layers[layer].attention.decay_rate, decay_rate(6, layer, 5, offset))


def test_the_decay_is_counted_from_zero_where_nothing_is_said():
    for said in (..., None, 0):
        assert mx.array_equal(make_model(decay_layer_offset=said).layers[1].attention.decay_rate, decay_rate(6, 1, 5))


def test_which_layers_are_linear():
    kinds = [RingConfig.from_dict(config(num_hidden_layers=8)).is_linear(i) for i in range(8)]
    assert kinds == [True, True, False, True, True, False, False, False]
    model = make_model(num_hidden_layers=8)
    assert [isinstance(layer.attention, LinearAttention) for layer in model.layers] == kinds


def test_softmax_siblings_have_no_linear_layer():
    for model_type in ("bailing_moe_v2", "bailing_moe"):
        c = RingConfig.from_dict(softmax_config() | {"model_type": model_type})
        model = Model(c)
        assert all(isinstance(layer.attention, SoftmaxAttention) for layer in model.layers)
        x = tokens(20)
        cache = model.make_cache()
        split = mx.concatenate([model(x[:, :7], cache), model(x[:, 7:], cache)], axis=1)
        assert_close(split, model(x), 1e-5)


CHANGES = [
    {"tie_word_embeddings": True},
    {"use_qkv_bias": True},
    {"use_bias": True},
    {"use_qk_norm": False},
    {"num_shared_experts": 0},
    {"num_shared_experts": 2},
    {"moe_router_enable_expert_bias": False},
    {"n_group": 1, "topk_group": 1},
    {"num_experts": 4, "n_group": 4, "topk_group": 3},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 5},
    {"head_dim": 24, "partial_rotary_factor": 1.0},
    {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12, "group_norm_size": 5},
    {"layer_group_size": 2, "num_hidden_layers": 3},
    {"num_hidden_layers": 1},
    {"norm_topk_prob": False},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: ",".join(c))
def test_shapes_and_splits_of_every_variant(changes):
    model = make_model(**changes)
    for name, value in tree_flatten(model.parameters()):
        if name.endswith(".bias"):
            value += 0.3
    x = tokens(50, B=2)
    whole = model(x)
    assert whole.shape == (2, 50, 70)
    cache = model.make_cache()
    split = mx.concatenate([model(x[:, :31], cache), model(x[:, 31:32], cache), model(x[:, 32:], cache)], axis=1)
    assert_close(split, whole, 1e-4)


def test_rope_is_neox_on_the_first_dims():
    for changes, theta in (({}, 10000), ({"rope_theta": 600000, "partial_rotary_factor": 0.25}, 600000)):
        attention = make_model(**changes).layers[0].attention
        x = mx.random.normal((1, 3, 9, 16), key=mx.random.key(0))
        dims = int(16 * changes.get("partial_rotary_factor", 0.5))
        assert_close(attention.rope(x, offset=7), reference.rope(to_numpy(x), dims, theta, 7), 1e-5)


def test_yarn_stretches_low_frequencies_only():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    plain = make_model(head_dim=64, partial_rotary_factor=1.0).layers[0].attention.rope
    yarn = make_model(head_dim=64, partial_rotary_factor=1.0, rope_scaling=scaling).layers[0].attention.rope
    x = mx.ones((1, 1, 1, 64))
    gain = 0.1 * np.log(4.0) + 1
    fast = [to_numpy(r(x, offset=5))[..., 0] for r in (yarn, plain)]
    slow = [to_numpy(yarn(x, offset=40))[..., 31], to_numpy(plain(x, offset=10))[..., 31]]
    np.testing.assert_allclose(fast[0], gain * fast[1], rtol=1e-4)
    np.testing.assert_allclose(slow[0], gain * slow[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 1.0}, 1.0),
        ({"attention_factor": 0.75, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.75),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * np.log(4.0) + 1) / (0.05 * np.log(4.0) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        *((alone, 0.1 * np.log(4.0) + 1) for alone in ({"mscale": 2.0}, {"mscale_all_dim": 1.0}, {"mscale": 0})),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarns_factor_is_the_one_of_transformers(given, factor):
    """In the operations and in what kernels get."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **given}
    attention = make_model(num_hidden_layers=1, num_experts=0, rope_scaling=scaling).layers[0].attention
    heads = attention.heads()
    x = mx.random.normal((1, 1, 1, 16), key=mx.random.key(0))
    turned, plain = to_numpy(heads.rope(x, offset=0)), to_numpy(x)
    assert heads.rope_scale == pytest.approx(factor, rel=1e-6)
    np.testing.assert_allclose(turned[..., :8], factor * plain[..., :8], rtol=1e-5)
    np.testing.assert_array_equal(turned[..., 8:], plain[..., 8:])


def test_bfloat16_drift_over_a_thousand_tokens_stays_under_twice_the_naive_form(monkeypatch):
    x = tokens(1000)
    exact = make_model(hidden_size=32, num_experts=0)
    expected = exact(x)
    model = make_model(hidden_size=32, num_experts=0)
    model.set_dtype(mx.bfloat16)
    cache = model.make_cache()
    fast = mx.concatenate(
        [model(x[:, :900], cache), *[model(x[:, t : t + 1], cache) for t in range(900, 1000)]], axis=1
    )
    for layer, c in zip(model.layers, cache, strict=True):
        if layer.is_linear:
            assert c[0].dtype == mx.float32

    monkeypatch.setattr(dispatch, "lightning_attn", naive_lightning_attn)
    naive = model(x)
    assert relative_rms(fast[:, 900:], expected[:, 900:]) < 2 * relative_rms(naive[:, 900:], expected[:, 900:])


def test_casting_the_weights_does_not_touch_decay():
    model = make_model()
    before = model.layers[0].attention.decay_rate
    model.set_dtype(mx.bfloat16)
    assert model.layers[0].attention.decay_rate.dtype == mx.float32
    assert_close(model.layers[0].attention.decay_rate, before, 0)


def test_exact_keeps_residual_norms_and_head_in_float32():
    x, wide = tokens(40), make_model(num_experts=0)
    narrow, exact = (make_model(num_experts=0, exact=e) for e in (False, True))
    for model in (narrow, exact):
        model.set_dtype(mx.bfloat16)
    hidden = []
    logits = exact(x, hidden_states=hidden)
    assert logits.dtype == mx.float32
    assert {h.dtype for h in hidden} == {mx.float32}
    assert narrow(x).dtype == mx.bfloat16
    rounded = make_model(num_experts=0)
    rounded.set_dtype(mx.bfloat16)
    rounded.set_dtype(mx.float32)
    best = rounded(x)
    assert relative_rms(logits, best) < relative_rms(narrow(x), best)
    assert relative_rms(logits, wide(x)) < 0.1


def test_gradients_reach_every_parameter():
    model = make_model()
    model.train()  # without the kernels, which have no gradients
    x = tokens(24)

    def loss(parameters):
        model.update(parameters)
        return (model(x) ** 2).mean()

    gradients = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    for name, g in gradients.items():
        if not name.endswith("expert_bias"):
            assert float(mx.abs(g).max()) > 0, name


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 3.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.5, "mscale_all_dim": 0.5},
    ],
    ids=["plain", "linear", "yarn"],
)
def test_kernels_get_the_rotation_that_mlx_lm_computes(scaling):
    """The angles a position and the factor, which only kernels read, give what mlx-lm's rope gives."""
    model = make_model(rope_scaling=scaling)
    attention = next(layer.attention for layer in model.layers if hasattr(layer.attention, "rope"))
    dims, offset, T = model.config.rope_dims, 37, 5
    inv_freq, scale = _rotation(attention.rope, dims)
    x = mx.random.normal((1, 2, T, model.config.head_dim))
    angles = (offset + mx.arange(T))[:, None] * inv_freq
    first, second, rest = mx.split(x, [dims // 2, dims], axis=-1)
    cos, sin = mx.cos(angles) * scale, mx.sin(angles) * scale
    ours = mx.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    assert_close(ours, attention.rope(x, offset=offset))
    if scaling and scaling["type"] == "yarn":
        assert scale != 1
