"""The kernel for QK-norm, rotation and split: against float64, bounds and races checked, faults caught."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_kernels import launch
from metal_kernels.qk_norm_rope import fused
from metal_kernels.qk_norm_rope.fused import fused_qk_norm_rope
from metal_kernels.qk_norm_rope.naive import naive_qk_norm_rope
from tests import kernel_reference as reference
from tests.compare import assert_close
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact, rope_frequencies


def arguments(B=2, T=5, HQ=3, HKV=2, D=64, R=32, dtype=mx.bfloat16, weight_dtype=mx.float32, norm=True, offset=3):
    keys = mx.random.split(mx.random.key(D + T), 3)
    qkv = mx.random.normal((B, T, (HQ + 2 * HKV) * D), key=keys[0]).astype(dtype)
    weights = [mx.random.uniform(0.5, 2, (D,), key=key).astype(weight_dtype) if norm else None for key in keys[1:]]
    return qkv, *weights, rope_frequencies(R), 1.25, offset, 1e-6, HQ, HKV


def check(backend, args):
    with launch.use(backend):
        actual = fused_qk_norm_rope(*args)
    for a, n, e in zip(actual, naive_qk_norm_rope(*args), reference.qk_norm_rope(*args), strict=True):
        assert_as_exact(a, n, e)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "R"), [(32, 8), (32, 32), (64, 32), (96, 48), (128, 64), (256, 128)])
def test_heads_of_every_size(backend, dtype, D, R):
    check(backend, arguments(D=D, R=R, dtype=dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_every_dtype(backend, weight_dtype):
    check(backend, arguments(weight_dtype=weight_dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (12, 3), (16, 4)])
def test_heads_that_fill_a_threadgroup_and_that_do_not(backend, heads):
    check(backend, arguments(B=1, T=2, HQ=heads[0], HKV=heads[1], D=32, R=16))


@pytest.mark.parametrize("backend", backends())
def test_without_norms(backend):
    check(backend, arguments(norm=False))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("offset", [0, 131071, mx.array([7, 100000]), mx.array(9)])
def test_positions(backend, offset):
    check(backend, arguments(dtype=mx.float32, offset=offset))


@pytest.mark.parametrize("backend", backends())
def test_values_are_copied_bit_for_bit(backend):
    args = arguments(HQ=1, HKV=1)
    with launch.use(backend):
        v = fused_qk_norm_rope(*args)[2]
    assert_close(v[:, 0], args[0][..., 128:], 0, mx.bfloat16)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 200])
def test_the_shapes_of_mini(backend, T):
    check(backend, arguments(B=1, T=T, HQ=16, HKV=4, D=128, R=64))


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
def test_a_missing_barrier_is_caught(n):
    args = arguments(dtype=mx.float32)
    with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_qk_norm_rope(*args), naive_qk_norm_rope(*args))


@pytest.mark.parametrize(
    "change",
    [
        ("head < HQ + 2 * HKV", "head <= HQ + 2 * HKV"),
        ("p < R / 2", "p <= R / 2"),
        ("p < R / 2", "p < R / 2 - 1"),
        ("is_query = head < HQ", "is_query = head <= HQ"),
        ("is_rotated = d < R ", "is_rotated = d <= R "),
        ("i < D / 32; i += P) {\n    const int d", "i < D / 32 - P; i += P) {\n    const int d"),
    ],
)
def test_a_bound_off_by_one_is_caught(change):
    args = arguments(dtype=mx.float32)
    with mutated(fused.KERNEL, change):
        assert is_caught(lambda: fused_qk_norm_rope(*args), naive_qk_norm_rope(*args))


def test_what_is_not_supported_is_refused():
    args = arguments(D=48, R=16)
    with pytest.raises(ValueError, match=r"\[qk_norm_rope\] no kernel for qkv \(2, 5, 336\)"):
        fused_qk_norm_rope(*args)
    qkv, q_weight, k_weight, inv_freq, *_ = arguments()
    assert takes(fused_qk_norm_rope, qkv, q_weight, k_weight, inv_freq, 1.0, 0, 1e-6, 3, 2)
    assert takes(fused_qk_norm_rope, qkv, None, None, inv_freq, 1.0, 0, 1e-6, 3, 2)
    assert not takes(fused_qk_norm_rope, qkv, q_weight, None, inv_freq, 1.0, 0, 1e-6, 3, 2)
    assert not takes(fused_qk_norm_rope, qkv, q_weight, k_weight.astype(mx.float16), inv_freq, 1.0, 0, 1e-6, 3, 2)
    assert not takes(fused_qk_norm_rope, qkv.astype(mx.int32), q_weight, k_weight, inv_freq, 1.0, 0, 1e-6, 3, 2)
    assert not takes(fused_qk_norm_rope, qkv, q_weight, k_weight, rope_frequencies(128), 1.0, 0, 1e-6, 3, 2)
    assert not takes(fused_qk_norm_rope, qkv[:, :0], q_weight, k_weight, inv_freq, 1.0, 0, 1e-6, 3, 2)
