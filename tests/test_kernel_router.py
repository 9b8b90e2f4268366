"""The kernel of the router: equal to float64 in every choice, bounds and races checked, faults caught."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.router import fused
from metal_kernels.router.fused import fused_route
from metal_kernels.router.naive import naive_route
from tests import reference
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import assert_as_exact

SHAPES = [
    # experts, top-k, groups, kept groups
    (256, 8, 8, 4),
    (60, 5, 5, 2),
    (12, 3, 12, 2),
    (16, 6, 4, 1),
    (40, 1, 1, 1),
    (33, 8, 3, 3),
    (96, 32, 2, 1),
    (8, 8, 2, 2),
    (64, 4, 64, 4),
]


def arguments(E=60, top_k=5, n_group=5, topk_group=2, tokens=3, has_bias=True, normalize=True, seed=0):
    keys = mx.random.split(mx.random.key(seed), 2)
    logits = mx.random.normal((tokens, E), key=keys[0])
    bias = mx.random.normal((E,), key=keys[1]) if has_bias else None
    return logits, bias, top_k, n_group, topk_group, 2.5, normalize


def check(backend, args):
    logits, bias, top_k, n_group, topk_group, factor, normalize = args
    with launch.use(backend):
        chosen, weights = fused_route(*args)
    naive_chosen, naive_weights = naive_route(*args)
    assert chosen.dtype == mx.int32
    assert np.array_equal(chosen, naive_chosen)
    bias64 = np.zeros(logits.shape[-1]) if bias is None else to_numpy(bias)
    for row, own in zip(to_numpy(logits), chosen.tolist(), strict=True):
        right, _ = reference.route(row, bias64, top_k, n_group, topk_group, factor)
        assert own[: len(right)] == right  # fewer, where the kept groups run out
        assert len(set(own)) == top_k
    scores = np.take_along_axis(1 / (1 + np.exp(-to_numpy(logits))), np.array(chosen), -1)
    if normalize and top_k > 1:
        scores /= scores.sum(-1, keepdims=True) + 1e-20
    assert_as_exact(weights, naive_weights, scores * factor)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape):
    check(backend, arguments(*shape))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_bias_and_without_normalisation(backend, has_bias, normalize):
    check(backend, arguments(has_bias=has_bias, normalize=normalize))


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 200])
def test_the_shapes_of_mini(backend, tokens):
    check(backend, arguments(256, 8, 8, 4, tokens))


@pytest.mark.parametrize("backend", backends("fast"))
def test_the_most_experts(backend):
    check(backend, arguments(1024, 32, 32, 4, 9))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_go_to_the_lower_index(backend, shape):
    logits, bias, *rest = arguments(*shape)
    check(backend, (mx.round(logits), mx.round(bias), *rest))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("value", [0.0, -30.0, 30.0])
def test_all_experts_equal(backend, value):
    logits, _, *rest = arguments()
    equal = mx.full(logits.shape, value)
    check(backend, (equal, None, *rest))
    with launch.use(backend):
        chosen, weights = fused_route(equal, None, *rest)
    assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert np.allclose(weights, 0.5)


@pytest.mark.parametrize("backend", backends())
def test_biases_that_make_every_score_negative(backend):
    logits, bias, *rest = arguments()
    check(backend, (logits, bias - 9, *rest))


@pytest.mark.parametrize("backend", backends())
def test_when_the_kept_groups_run_out_the_lowest_of_the_rest_follow(backend):
    logits, bias, *_ = arguments(16, 6, 4, 1)
    check(backend, (logits, bias, 6, 4, 1, 2.5, True))
    check(backend, (mx.zeros((3, 16)), None, 6, 4, 1, 2.5, True))


@pytest.mark.parametrize("backend", backends())
def test_leading_axes_are_kept(backend):
    logits, *rest = arguments(tokens=6)
    with launch.use(backend):
        chosen, weights = fused_route(logits.reshape(2, 3, 60), *rest)
    assert chosen.shape == weights.shape == (2, 3, 5)
    assert np.array_equal(chosen.reshape(6, 5), naive_route(logits, *rest)[0])


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
def test_a_missing_barrier_is_caught(n):
    args = arguments()
    with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_route(*args), naive_route(*args))


@pytest.mark.parametrize(
    "change",
    [
        ("e < E; e += THREADS) biased", "e <= E; e += THREADS) biased"),
        ("e < E; e += THREADS) biased", "e < E - 1; e += THREADS) biased"),
        ("e < E; e += THREADS) biased", "e < THREADS; e += THREADS) biased"),
        ("e < E; e += THREADS) {", "e <= E; e += THREADS) {"),
        ("e < E; e += THREADS) {", "e < THREADS; e += THREADS) {"),
        ("expert < E ?", "expert <= E ?"),
        ("above >= TOPK_GROUP", "above > TOPK_GROUP"),
        ("g < GROUPS; g += SIMDGROUPS", "g <= GROUPS; g += SIMDGROUPS"),
        ("g < GROUPS; g++", "g < GROUPS - 1; g++"),
        ("n < TOP_K", "n < TOP_K - 1"),
        ("i + int(lane) < SIZE", "i + int(lane) <= SIZE"),
        ("int(lane) < TOP_K) {", "int(lane) <= TOP_K) {"),
        ("g < own)", "g > own)"),
        ("lane == winner ? second : first", "first"),
    ],
)
def test_a_bound_off_by_one_is_caught(change):
    cases = [arguments(), arguments(seed=3), (mx.zeros((2, 60)), None, 5, 5, 2, 2.5, True), arguments(300, 8, 10, 3)]
    with mutated(fused.KERNEL, change):
        assert any(is_caught(lambda args=args: fused_route(*args), naive_route(*args)) for args in cases)


def test_what_is_not_supported_is_refused():
    logits, bias, *_ = arguments()
    assert takes(fused_route, logits, bias, 5, 5, 3, 2.5, True)
    assert takes(fused_route, logits, None, 5, 1, 3, 2.5, True)
    assert not takes(fused_route, logits, bias, 5, 7, 3, 2.5, True)
    assert not takes(fused_route, logits, bias, 33, 5, 3, 2.5, True)
    assert not takes(fused_route, logits.astype(mx.bfloat16), bias, 5, 5, 3, 2.5, True)
    assert not takes(fused_route, logits, bias.astype(mx.bfloat16), 5, 5, 3, 2.5, True)
    assert not takes(fused_route, mx.zeros((1, 2048)), None, 5, 1, 3, 2.5, True)
    with pytest.raises(ValueError, match=r"\[route\] no kernel for logits \(3, 60\)"):
        fused_route(logits, bias, 5, 7, 2, 2.5, True)
