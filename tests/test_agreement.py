"""One wrong element among millions is seen, rounding is not, and near ties of experts may fall either way."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from metal_kernels import agreement
from metal_kernels.agreement import agree
from metal_kernels.router.choice import agree_on_experts
from metal_kernels.router.naive import naive_route

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def problem(found, expected, operation="linear_gate", arguments=()):
    return agree(operation, arguments, found, expected)[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_rounded_once_agrees_and_one_wrong_element_does_not(dtype):
    exact = normal(300, 700) * mx.exp(2 * normal(300, 1, seed=1))  # rows of very different sizes
    y = exact.astype(dtype)
    other = (exact * (1 + 2e-7 * normal(300, 700, seed=2))).astype(dtype)
    assert problem([other], [y]) == ""
    for at in ((0, 0), (299, 699), (150, 3)):
        wrong = mx.array(other)
        wrong[at] = wrong[at] + 0.1 * mx.sqrt(mx.square(exact[at[0]]).mean()).astype(dtype)
        assert "an element" in problem([wrong], [y]), at


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_wrong_is_seen_however_small_it_is(dtype):
    y = normal(64, 128)
    y[5] = y[5] * 0.01
    other = mx.array(y)
    other[5] = y[6] * 0.01
    assert problem([other.astype(dtype)], [y.astype(dtype)])


def test_what_is_not_finite_or_of_another_kind():
    y = normal(4, 8)
    broken = mx.array(y)
    broken[2, 2] = mx.inf
    assert problem([broken], [y]) == "output 0 of linear_gate is not finite"
    assert problem([y], [broken]) is None
    assert "bfloat16" in problem([y.astype(mx.bfloat16)], [y])
    assert "(8, 4)" in problem([y.T], [y])
    assert problem([0 * y], [0 * y]) == ""
    assert problem([0 * y + 1e-9], [0 * y])
    assert problem([y * 1e-25], [y * 1e-25]) == ""
    assert problem([y[::-1] * 1e-25], [y * 1e-25])
    assert problem([y * 1e30], [y * 1e30]) == ""


def test_a_state_is_held_to_float32_whatever_the_inputs_are():
    o, state = normal(3, 8, dtype=mx.bfloat16), normal(2, 8, 8)
    off = state * 1.003
    assert problem((o, state), (o, state), "lightning_attn", (o,)) == ""
    assert "output 1" in problem((o, off), (o, state), "lightning_attn", (o,))
    assert problem((off,), (state,), "linear_gate", (o,)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["cancelled out", "far larger", "one far larger"])
def test_a_product_is_held_to_its_own_size_whatever_is_added(dtype, kind):
    product = 100 * normal(6, 256)
    others = product * (1 + 2e-7 * normal(6, 256, seed=1))
    added = {"cancelled out": -product * (1 + 1e-4 * normal(6, 256, seed=2)), "far larger": 3e4 + product}
    added = added.get(kind, mx.where(mx.arange(256) == 7, 3e4, product)).astype(dtype)
    y, other = ((added.astype(mx.float32) + p).astype(dtype) for p in (product, others))
    for operation, place in agreement.ADDED.items():
        arguments = (*[None] * place, added)
        assert problem([other], [y], operation, arguments) == ""
        assert problem([added + mx.roll(product, 1, 0).astype(dtype)], [y], operation, arguments), operation


def test_a_state_that_adds_up_to_little_is_as_exact_as_what_was_added():
    """A column of huge values, and rows in which it cancels out."""
    k, v = normal(600, 2048), mx.where(mx.arange(32) == 3, 1e4, 1.0) * normal(600, 32, seed=1)
    state, other = k.T @ v, k[::-1].T @ v[::-1]
    assert mx.abs(state[:, 3]).min() < 1e-3 * mx.abs(state[:, 3]).max()
    assert problem((v, other), (v, state), "lightning_attn") == ""


def test_numbers_below_the_smallest_of_float16_have_fewer_bits():
    exact = 1e-6 * normal(50, 64)
    y, other = (x.astype(mx.float16) for x in (exact, exact + 5e-8 * mx.sign(normal(50, 64, seed=1))))
    assert problem([other], [y]) == ""
    assert problem([mx.roll(y, 1, 0)], [y])


def test_a_result_that_is_absurdly_far_away_has_an_error_that_is_a_number():
    y = normal(4, 8)
    error, said = agree("linear_gate", (), [y * 0 + 1e38], [y * 1e-20])
    assert said
    assert math.isfinite(error)


def test_tf32_widens_the_limits_of_float32(monkeypatch):
    y = normal(50, 50)
    other = y * (1 + 2.0**-10 * normal(50, 50, seed=1))
    assert problem([other], [y])
    monkeypatch.setattr(agreement, "_multiplies_float32", lambda: False)
    assert problem([other], [y]) == ""
    assert problem([y * 1.01], [y])


OPTIONS = (3, 4, 2, 2.5, True)


def judge(chosen, weights, logits, bias=None, options=OPTIONS):
    return agree_on_experts("route", (logits, bias, *options), (chosen, weights), naive_route(logits, bias, *options))


def test_experts_agree_with_themselves_and_not_with_others():
    logits, bias = normal(40, 16), normal(16, seed=1)
    chosen, weights = naive_route(logits, bias, *OPTIONS)
    assert judge(chosen, weights, logits, bias)[1] == ""
    assert "weighs" in judge(chosen, weights * 1.01, logits, bias)[1]
    swapped = mx.concatenate([chosen[:, 1:2], chosen[:, :1], chosen[:, 2:]], axis=1)
    assert "away from" in judge(swapped, weights, logits, bias)[1]
    one = mx.array(chosen)
    one[39, 2] = (one[39, 2] + 1) % 16
    assert judge(one, weights, logits, bias)[1]
    for beyond in (-1, 16):
        one[39, 2] = beyond
        assert "not there" in judge(one, weights, logits, bias)[1]
    one[39, 2] = one[39, 1]
    assert "twice" in judge(one, weights, logits, bias)[1]
    assert judge(chosen, weights, logits * mx.nan, bias)[1] is None
    assert "instead of" in judge(chosen[:20], weights[:20], logits, bias)[1]


def test_near_ties_may_fall_either_way():
    logits = normal(1, 16)
    logits[0, 3] = logits[0, 2] + 2e-7
    order = (2, 1, 1, 1.0, False)
    best = mx.where(mx.array([[i in (2, 3) for i in range(16)]]), 1 + logits, -9.0)
    chosen, weights = naive_route(best, None, *order)
    assert judge(chosen[:, ::-1], weights[:, ::-1], best, None, order)[1] == ""
    # Two groups of equal best experts, of which one stays: all experts may be of the other one.
    pair = mx.array([[3.0, 2.0, -5.0, -5.0, 3.0, 2.0, -5.0, -5.0]])
    options = (2, 2, 1, 1.0, True)
    chosen, weights = naive_route(pair, None, *options)
    assert judge((chosen + 4) % 8, weights, pair, None, options)[1] == ""
    clear = mx.array([[3.0, 2.0, -5.0, -5.0, 2.5, 2.0, -5.0, -5.0]])
    assert judge(mx.array([[4, 5]], mx.int32), weights, clear, None, options)[1]
