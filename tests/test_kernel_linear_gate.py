"""The kernel of the linear gate: against float64, bounds and races checked, faults caught."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.linear_gate import fused
from metal_kernels.linear_gate.fused import fused_linear_gate
from metal_kernels.linear_gate.naive import naive_linear_gate
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact

EPS = 1e-6


def arguments(shape=(2, 3, 96), groups=3, x_dtype=mx.bfloat16, dtype=mx.bfloat16, weight_dtype=mx.float32):
    keys = mx.random.split(mx.random.key(shape[-1]), 3)
    x = (mx.random.normal(shape, key=keys[0]) * 5).astype(x_dtype)
    gate = (mx.random.normal(shape, key=keys[1]) * 3).astype(dtype)
    weight = mx.random.uniform(0.5, 2, shape[-1:], key=keys[2]).astype(weight_dtype)
    return x, gate, weight, groups, EPS


def exact(x, gate, weight, groups, eps):
    x64, gate64 = to_numpy(x), to_numpy(gate)
    grouped = x64.reshape(*x64.shape[:-1], groups, -1)
    normed = (grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + eps)).reshape(x64.shape)
    return to_numpy(weight) * normed / (1 + np.exp(-gate64))


def check(backend, args):
    with launch.use(backend):
        actual = fused_linear_gate(*args)
    assert_as_exact(actual, naive_linear_gate(*args), exact(*args))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [mx.float32, mx.bfloat16])
def test_every_mix_of_dtypes(backend, x_dtype, dtype, weight_dtype):
    check(backend, arguments(x_dtype=x_dtype, dtype=dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 2048), 4),
        ((2, 3, 70), 2),
        ((2, 3, 21), 3),
        ((5, 24), 24),
        ((1, 3, 640), 1),
        ((1, 1, 8192), 1),
        ((40, 96), 3),
    ],
)
def test_groups_of_every_size(backend, shape, groups):
    check(backend, arguments(shape, groups, dtype=mx.float32))


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 200])
def test_the_shapes_of_mini(backend, T):
    check(backend, arguments((1, T, 2048), 4, weight_dtype=mx.bfloat16))


@pytest.mark.parametrize("backend", backends())
def test_gates_far_open_and_far_shut_stay_finite(backend):
    x, _, weight, groups, eps = arguments(dtype=mx.float32)
    gate = mx.where(mx.arange(96) % 2 == 0, 200.0, -200.0) * mx.ones(x.shape)
    check(backend, (x, gate, weight, groups, eps))


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
def test_a_missing_barrier_is_caught(n):
    args = arguments((1, 1, 640), 1)
    with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: [fused_linear_gate(*args)], [naive_linear_gate(*args)])


@pytest.mark.parametrize(
    "change",
    [
        ("unit < count[0]", "unit <= count[0]"),
        ("is_live && at < SIZE;", "is_live && at <= SIZE;"),
        ("is_live && at < SIZE)", "is_live && at <= SIZE)"),
        ("is_live && at < SIZE)", "is_live && at < SIZE - P)"),
        ("i < SIMDGROUPS; i++) sum", "i < SIMDGROUPS - 1; i++) sum"),
        (
            "i < STEPS; i++) {\n  const int at = i * STRIDE + own;\n  if",
            "i < STEPS - 1; i++) {\n  const int at = i * STRIDE + own;\n  if",
        ),
    ],
)
def test_a_bound_off_by_one_is_caught(change):
    args = arguments((1, 3, 480), 1)
    with mutated(fused.KERNEL, change):
        assert is_caught(lambda: [fused_linear_gate(*args)], [naive_linear_gate(*args)])


def test_what_is_not_supported_is_refused():
    x, gate, weight, groups, eps = arguments()
    assert takes(fused_linear_gate, x, gate, weight, groups, 1e-6)
    assert not takes(fused_linear_gate, x, gate, weight, 5, 1e-6)
    assert not takes(fused_linear_gate, x, gate[:1], weight, groups, 1e-6)
    assert not takes(fused_linear_gate, x.astype(mx.int32), gate, weight, groups, 1e-6)
    assert not takes(fused_linear_gate, x[:0], gate[:0], weight, groups, 1e-6)
    with pytest.raises(ValueError, match=r"\[linear_gate\] no kernel for x \(2, 3, 96\)"):
        fused_linear_gate(x, gate, weight, 5, eps)
