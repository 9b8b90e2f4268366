"""Lightning attention: the recurrence against float64, chunks against the recurrence."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import chunk_lightning_attn, lightning_attn, naive_lightning_attn
from tests import reference
from tests.compare import assert_close, relative_rms, to_numpy

RATES = [1e-5, 0.03, 0.7]


def inputs(B=2, T=65, H=3, K=8, V=12, dtype=mx.float32, seed=0):
    keys = mx.random.split(mx.random.key(seed), 4)
    q, k = (mx.random.normal((B, T, H, K), key=keys[i]).astype(dtype) for i in range(2))
    v = mx.random.normal((B, T, H, V), key=keys[2]).astype(dtype)
    state = mx.random.normal((B, H, K, V), key=keys[3])
    return q, k, v, mx.array(RATES[:H]), K**-0.5, state


def ragged_mask(B, T):
    return mx.random.bernoulli(0.6, (B, T), key=mx.random.key(9))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_naive_is_the_recurrence(with_state, masked):
    q, k, v, rate, scale, state = inputs(T=17)
    state = state if with_state else None
    mask = ragged_mask(2, 17) if masked else None
    o, S = naive_lightning_attn(q, k, v, rate, scale, state, mask)
    args = [None if x is None else to_numpy(x) for x in (q, k, v, rate)]
    o64, S64 = reference.lightning_attn(
        *args, scale, None if state is None else to_numpy(state), None if mask is None else np.asarray(mask)
    )
    assert_close(o, o64, 1e-6)
    assert_close(S, S64, 1e-6)


@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_recurrence(T, chunk_size, masked):
    q, k, v, rate, scale, state = inputs(T=T)
    mask = ragged_mask(2, T) if masked else None
    expected = naive_lightning_attn(q, k, v, rate, scale, state, mask)
    actual = chunk_lightning_attn(q, k, v, rate, scale, state, mask, chunk_size)
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 5.0, 90.0, 1e4])
def test_extreme_decays_stay_finite_and_right(rate):
    q, k, v, _, scale, state = inputs(T=200)
    rates = mx.full((3,), rate)
    for a, e in zip(
        chunk_lightning_attn(q, k, v, rates, scale, state),
        naive_lightning_attn(q, k, v, rates, scale, state),
        strict=True,
    ):
        assert_close(a, e, 1e-5)


def test_more_than_one_segment(monkeypatch):
    import sys

    chunk = sys.modules["metal_kernels.lightning_attn.chunk"]
    monkeypatch.setattr(chunk, "SEGMENT_TOKENS", 32)
    q, k, v, rate, scale, state = inputs(T=150)
    actual = chunk_lightning_attn(q, k, v, rate, scale, state, ragged_mask(2, 150), 16)
    expected = naive_lightning_attn(q, k, v, rate, scale, state, ragged_mask(2, 150))
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-5)


@settings(max_examples=25, deadline=None)
@given(T=st.integers(2, 90), at=st.integers(1, 89), chunk_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_split_equals_the_whole(T, at, chunk_size, seed):
    at = min(at, T - 1)
    q, k, v, rate, scale, state = inputs(B=1, T=T, seed=seed)
    whole_o, whole_S = chunk_lightning_attn(q, k, v, rate, scale, state, None, chunk_size)
    a, S = lightning_attn(q[:, :at], k[:, :at], v[:, :at], rate, scale, state)
    b, S = lightning_attn(q[:, at:], k[:, at:], v[:, at:], rate, scale, S)
    assert_close(mx.concatenate([a, b], axis=1), whole_o, 1e-5)
    assert_close(S, whole_S, 1e-5)


def test_a_masked_token_leaves_the_state_alone():
    q, k, v, rate, scale, state = inputs(T=5)
    for form in (naive_lightning_attn, chunk_lightning_attn):
        _, S = form(q, k, v, rate, scale, state, mx.zeros((2, 5), mx.bool_))
        assert_close(S, state, 1e-7)


def test_nan_under_the_mask_would_be_seen_but_zero_keys_do_not_leak():
    q, k, v, rate, scale, state = inputs(T=40)
    mask = mx.arange(40)[None] >= mx.array([[3], [17]])
    expected = chunk_lightning_attn(q, k, v, rate, scale, state, mask, 16)
    wild = mx.where(mask[..., None, None], v, 1e6)
    actual = chunk_lightning_attn(q, k, wild, rate, scale, state, mask, 16)
    assert_close(actual[1], expected[1], 1e-6)


def test_half_precision_input_keeps_a_float32_state():
    q, k, v, rate, scale, state = inputs(T=70, dtype=mx.bfloat16)
    o, S = chunk_lightning_attn(q, k, v, rate, scale, state)
    naive_o, naive_S = naive_lightning_attn(q, k, v, rate, scale, state)
    assert o.dtype == mx.bfloat16
    assert S.dtype == mx.float32
    assert relative_rms(o, naive_o) < 4e-3
    assert_close(S, naive_S, 1e-5)


def test_no_tokens_change_nothing():
    q, k, v, rate, scale, state = inputs(T=0)
    for form in (naive_lightning_attn, chunk_lightning_attn):
        o, S = form(q, k, v, rate, scale, state)
        assert o.shape == (2, 0, 3, 12)
        assert_close(S, state, 0)


def test_chunk_size_is_checked():
    with pytest.raises(ValueError, match="chunk_size must be positive but got 0"):
        chunk_lightning_attn(*inputs(T=4)[:5], chunk_size=0)


def test_gradients_equal_those_of_the_recurrence():
    q, k, v, rate, scale, state = inputs(B=1, T=21)

    def loss(form):
        return lambda q, k, v: (form(q, k, v, rate, scale, state)[0] ** 2).sum()

    fast = mx.grad(loss(lambda *a: chunk_lightning_attn(*a, None, 8)), argnums=(0, 1, 2))(q, k, v)
    plain = mx.grad(loss(naive_lightning_attn), argnums=(0, 1, 2))(q, k, v)
    for a, e in zip(fast, plain, strict=True):
        assert_close(a, e, 1e-5)
