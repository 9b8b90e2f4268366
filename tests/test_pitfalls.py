"""The nine places where ports of this model go wrong, or, as to the decay's layers, where public sources disagree.

Each test holds the right form against numbers or equations written down here, then puts the wrong form back and
asserts that the same check fails: a test that cannot fail proves nothing.
"""

from __future__ import annotations

import dataclasses
import io
import math

import mlx.core as mx
import numpy as np
import pytest

import ring_mlx.model.attention as attention
import ring_mlx.model.moe as moe
from metal_kernels import chunk_lightning_attn, dispatch, launch, naive_lightning_attn, route
from ring_mlx import load_model
from ring_mlx.model.config_values import CLAMPED
from ring_mlx.model.decay import alibi_slopes, decay_rate
from tests import reference
from tests.compare import assert_close, relative_rms, to_numpy
from tests.tiny import GOLDENS, make_model, tokens


def golden_check():
    """Logits of both goldens within 1e-4; the model is built anew, so that patches take effect."""
    for name in ("mini_like", "flash_like"):
        expected = mx.load(str(GOLDENS / name / "golden.safetensors"))
        model = load_model(GOLDENS / name, dtype=mx.float32)
        assert_close(model(expected["tokens"][None])[0], expected["logits"], 1e-4)


@pytest.fixture(autouse=True)
def plain_forms():
    """The wrong forms are put into the plain path; kernels are held to the right one by tests of their own."""
    with launch.use(None):
        yield


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def test_pitfall_1_decay_counts_layers_from_zero_unless_config_says_otherwise(monkeypatch):
    """Whether real weights were trained so nobody here knows; the goldens are computed so."""
    golden_check()

    def one_less(heads, layer, layers, _):
        return decay_rate(heads, layer, layers, CLAMPED)

    monkeypatch.setattr(attention, "decay_rate", one_less)
    fails(golden_check)


def decay_check(form):
    """Over 64 tokens without input a state of Ring-mini shapes fades as exp(-64 s), at every layer and head."""
    for layer in (0, 9, 18):
        rate = decay_rate(16, layer, 20)
        zeros = mx.zeros((1, 64, 16, 2))
        _, S = form(zeros, zeros, zeros, rate, 1.0, mx.ones((1, 16, 2, 2)))
        expected = np.exp(-64 * np.array(alibi_slopes(16)) * (1 - layer / 19 + 1e-5))
        np.testing.assert_allclose(to_numpy(S)[0, :, 0, 0], expected, rtol=1e-4)


def rounded_decay(q, k, v, rate, scale, state, mask=None):
    factor = mx.exp(-rate).astype(mx.bfloat16).astype(mx.float32)
    return naive_lightning_attn(q, k, v, -mx.log(factor), scale, state, mask)


def test_pitfall_2_decay_is_float32():
    decay_check(naive_lightning_attn)
    decay_check(chunk_lightning_attn)
    fails(decay_check, rounded_decay)
    rates = [decay_rate(16, i, 20) for i in range(20) if (i + 1) % 5]
    never_forgets = [sum(int((mx.exp(-r).astype(d) == 1).sum()) for r in rates) for d in (mx.float32, mx.bfloat16)]
    assert never_forgets == [0, 24], "of 256 (layer, head) pairs of Ring-mini"


def rounded_state(q, k, v, rate, scale, state=None, mask=None):
    out = []
    for t in range(q.shape[1]):
        step = slice(t, t + 1)
        o, state = naive_lightning_attn(q[:, step], k[:, step], v[:, step], rate, scale, state)
        state = state.astype(mx.bfloat16)
        out.append(o)
    return mx.concatenate(out, axis=1), state


def state_check(form):
    """After 1,024 bfloat16 tokens the state is within 1e-3 of the float64 recurrence."""
    keys = mx.random.split(mx.random.key(0), 3)
    q, k, v = (mx.random.normal((1, 1024, 2, 4), key=key).astype(mx.bfloat16) for key in keys)
    rate = mx.array([1e-4, 1e-3])
    _, S = form(q, k, v, rate, 0.5)
    _, expected = reference.lightning_attn(*(to_numpy(x) for x in (q, k, v, rate)), 0.5, None, None)
    assert S.dtype == mx.float32
    assert_close(S, expected, 1e-3)


def test_pitfall_3_state_is_float32():
    state_check(naive_lightning_attn)
    state_check(chunk_lightning_attn)
    fails(state_check, rounded_state)
    model = make_model()
    model.set_dtype(mx.bfloat16)
    cache = model.make_cache()
    model(tokens(9), cache)
    model(tokens(1), cache)
    assert {c[0].dtype for layer, c in zip(model.layers, cache, strict=True) if layer.is_linear} == {mx.float32}


def padding_check():
    """A left-padded row gives the logits of the row alone."""
    model = make_model()
    row = tokens(20)
    cache = model.make_cache(left_padding=[13, 0])
    batch = mx.concatenate([mx.concatenate([mx.full((1, 13), 5), row], axis=1), tokens(33, seed=2)])
    assert_close(model(batch, cache)[:1, 13:], model(row), 1e-4)
    following = model(tokens(1, B=2), cache)
    alone = model.make_cache()
    model(row, alone)
    assert_close(following[:1], model(tokens(1, B=2)[:1], alone), 1e-4)


def test_pitfall_4_padding_neither_adds_nor_decays(monkeypatch):
    padding_check()
    right = dispatch.lightning_attn
    monkeypatch.setattr(dispatch, "lightning_attn", lambda *a: right(*a[:6], None))
    fails(padding_check)


def operations_check():
    """Prefill builds a graph whose size does not grow with the prompt."""
    model = make_model()
    short, long = (_graph_size(model, n) for n in (65, 450))
    assert long <= 1.1 * short, f"{short} operations for 65 tokens, {long} for 450"


def _graph_size(model, T):
    out = io.StringIO()
    mx.export_to_dot(out, model(tokens(T)))
    return out.getvalue().count(" -> ")


def test_pitfall_5_prefill_is_chunked(monkeypatch):
    operations_check()
    monkeypatch.setattr(dispatch, "lightning_attn", naive_lightning_attn)
    fails(operations_check)


def groups_check(form):
    """With negative biased scores the chosen experts still come from the kept groups."""
    logits = mx.random.normal((50, 16), key=mx.random.key(0))
    bias = mx.full((16,), -3.0)
    chosen, _ = form(logits, bias, 4, 4, 2, 2.5, True)
    for t in range(50):
        assert chosen[t].tolist() == reference.route(to_numpy(logits[t]), to_numpy(bias), 4, 4, 2, 2.5)[0]


def zero_filled(logits, bias, top_k, n_group, topk_group, factor, normalize):
    biased = (mx.sigmoid(logits) + bias).reshape(-1, n_group, logits.shape[-1] // n_group)
    dropped = mx.argsort(mx.sort(biased, axis=-1)[..., -2:].sum(-1), axis=-1)[:, : n_group - topk_group, None]
    biased = mx.put_along_axis(biased, dropped, mx.array(0.0), axis=1).flatten(1)
    return mx.argsort(-biased, axis=-1)[:, :top_k], None


def test_pitfall_6_dropped_groups_are_minus_infinity():
    groups_check(route)
    fails(groups_check, zero_filled)


def router_check(exact_logits):
    """Two experts whose logits differ by less than half precision resolves are told apart."""
    model = make_model(
        num_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, moe_router_enable_expert_bias=False
    )
    router = model.layers[1].mlp.gate
    weight = mx.zeros((4, 48))
    weight[:, 0], weight[2, 1] = 1.0, 1.0
    router.gate_proj.weight = weight.astype(mx.bfloat16)
    x = mx.zeros((1, 1, 48))
    x[..., 0], x[..., 1] = 1.0, 1e-4
    chosen, weights = exact_logits(router, x)
    assert weights.dtype == mx.float32
    assert chosen.flatten().tolist() == [2]


def test_pitfall_7_router_product_is_float32():
    router_check(lambda router, x: router(x))

    def half(router, x):
        logits = x.astype(mx.bfloat16) @ router.gate_proj.weight.T
        return route(logits, None, *router._options)

    fails(router_check, half)


def sum_check():
    """With bfloat16 experts, the routed sum is as exact as their outputs: rounded weights would be 10 times worse."""
    model = make_model(num_shared_experts=0)
    model.set_dtype(mx.bfloat16)
    block = model.layers[1].mlp
    x = mx.random.normal((1, 64, 48), key=mx.random.key(4)).astype(mx.bfloat16)
    chosen, weights = block.gate(x)
    outputs = to_numpy(block.switch_mlp(x, chosen))
    expected = (outputs * to_numpy(weights)[..., None]).sum(axis=-2)
    y = block(x)
    assert y.dtype == mx.float32
    assert relative_rms(y, expected) < 2e-4


def test_pitfall_8_weighted_sum_is_float32(monkeypatch):
    sum_check()
    monkeypatch.setattr(moe.MoE, "__call__", _rounded_sum)
    fails(sum_check)


def _rounded_sum(self, x, dtype=None):
    chosen, weights = self.gate(x)
    y = self.switch_mlp(x, chosen)
    return (y * weights.astype(y.dtype)[..., None]).sum(axis=-2).astype(mx.float32)


def head_dim_check():
    """head_dim need not be hidden_size / heads, on linear layers as well."""
    for dim in (8, 32):
        model = make_model(head_dim=dim)
        for layer in model.layers:
            assert layer.attention.head_dim == dim
            assert layer.attention.dense.weight.shape == (48, 6 * dim)
            assert math.isclose(layer.attention.scale, dim**-0.5)
        cache = model.make_cache()
        model(tokens(3), cache)
        assert cache[0][0].shape == (1, 6, dim, dim)


def test_pitfall_9_head_dim_is_honoured(monkeypatch):
    head_dim_check()
    right = attention.LinearAttention.__init__

    def ignoring(self, config, layer):
        right(self, dataclasses.replace(config, head_dim=config.hidden_size // config.num_attention_heads), layer)

    monkeypatch.setattr(attention.LinearAttention, "__init__", ignoring)
    fails(head_dim_check)
