"""Router and linear gate against independent float64 forms."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import linear_gate, route
from tests import reference
from tests.compare import assert_close, to_numpy


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(256, 8, 4, 8), (12, 4, 2, 3), (24, 3, 1, 5), (6, 1, 1, 2)]
)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_route_equals_the_definition(experts, groups, kept, top_k, shift):
    logits = mx.random.normal((5, 7, experts), key=mx.random.key(0))
    bias = 0.3 * mx.random.normal((experts,), key=mx.random.key(1)) + shift
    chosen, weights = route(logits, bias, top_k, groups, kept, 2.5, True)
    assert chosen.shape == weights.shape == (5, 7, top_k)
    assert chosen.dtype == mx.int32
    for i in range(5):
        for j in range(7):
            ids, w = reference.route(to_numpy(logits[i, j]), to_numpy(bias), top_k, groups, kept, 2.5)
            assert chosen[i, j].tolist() == ids
            assert_close(weights[i, j], w, 1e-6)


def test_ties_go_to_the_lower_index():
    chosen, weights = route(mx.zeros((2, 16)), mx.zeros((16,)), 3, 4, 2, 1.0, True)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(to_numpy(weights), 1 / 3, rtol=1e-6)


def test_unnormalised_weights_and_a_single_expert():
    logits = mx.random.normal((4, 8), key=mx.random.key(2))
    chosen, weights = route(logits, None, 2, 1, 1, 1.5, False)
    assert_close(weights, 1.5 * mx.take_along_axis(mx.sigmoid(logits), chosen, -1), 1e-6)
    chosen, weights = route(logits, None, 1, 1, 1, 1.0, True)
    assert_close(weights, mx.take_along_axis(mx.sigmoid(logits), chosen, -1), 1e-6)


def test_half_precision_logits_are_scored_in_float32():
    logits = mx.random.normal((9, 12), key=mx.random.key(3)).astype(mx.bfloat16)
    chosen, weights = route(logits, None, 3, 4, 2, 2.5, True)
    same, exact = route(logits.astype(mx.float32), None, 3, 4, 2, 2.5, True)
    assert chosen.tolist() == same.tolist()
    assert_close(weights, exact, 0)


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_linear_gate_equals_the_definition(groups):
    x = mx.random.normal((2, 5, 24), key=mx.random.key(0)) * 30
    gate = mx.random.normal((2, 5, 24), key=mx.random.key(1))
    weight = mx.random.normal((24,), key=mx.random.key(2))
    x64, g64, w64 = (to_numpy(a) for a in (x, gate, weight))
    parts = x64.reshape(2, 5, groups, -1)
    normed = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6)).reshape(2, 5, 24)
    assert_close(linear_gate(x, gate, weight, groups, 1e-6), w64 * normed / (1 + np.exp(-g64)), 1e-6)


def test_linear_gate_rounds_once_to_the_gates_dtype():
    x, gate = (mx.random.normal((3, 8), key=mx.random.key(i)) for i in range(2))
    half = gate.astype(mx.bfloat16)
    y = linear_gate(x, half, mx.ones((8,)), 2, 1e-6)
    assert_close(y, linear_gate(x, half.astype(mx.float32), mx.ones((8,)), 2, 1e-6).astype(mx.bfloat16), 0, mx.bfloat16)


def test_linear_gate_names_a_group_count_that_does_not_divide():
    with pytest.raises(ValueError, match="divide the width 8 but got 3"):
        linear_gate(mx.ones((1, 8)), mx.ones((1, 8)), mx.ones((8,)), 3, 1e-6)
