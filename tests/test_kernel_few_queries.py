"""The kernel for attention of a few queries: against float64, bounds and races checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.few_queries import fused
from metal_kernels.few_queries.fused import fused_few_queries
from metal_kernels.few_queries.naive import Queries, naive_few_queries
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.metal_sim.marks import needs_simulator
from tests.test_kernels_as_cuda import recording_backend

CHECKED, FAST = backends(), backends("fast")


def arguments(B=2, HQ=6, HKV=3, T=4, D=64, L=70, offset=41, start=None, dtype=mx.bfloat16, held=None):
    """Every axis has another length unless a test asks otherwise; what lies behind the last query is not finite."""
    q, k, v = (
        mx.random.normal((B, heads, n, D), key=key) * 2
        for heads, n, key in zip((HQ, HKV, HKV), (T, L, L), mx.random.split(mx.random.key(D + T), 3), strict=True)
    )
    offset, start = (mx.array(x) if isinstance(x, list) else x for x in (offset, start))
    last = T + (offset if isinstance(offset, int) else (offset if start is None else offset + start).max().item())
    k, v = (mx.where(mx.arange(L)[:, None] < last, x, mx.nan).astype(held or dtype) for x in (k, v))
    return q.astype(dtype), k, v, offset, 0.3, start


def exact(*arguments):
    """The contract of `naive_few_queries` in float64, one query after the other."""
    q, k, v, offset, scale, start = Queries(*arguments)
    wide, (B, HQ, T, D), HKV = [to_numpy(x) for x in (q, k, v)], q.shape, k.shape[1]
    before = np.zeros(B, int) if start is None else np.array(start)
    out = np.zeros((B, T, HQ, D))
    for b, t, h in np.ndindex(B, T, HQ):
        own = int(np.broadcast_to(np.array(offset).reshape(-1), B)[b] + before[b]) + t
        seen = slice(before[b], own + 1) if own >= before[b] else slice(own, own + 1)
        keys, values = (x[b, h * HKV // HQ, seen] for x in wide[1:])
        scores = scale * keys @ wide[0][b, h, t]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values
    return out.reshape(B, T, HQ * D)


def finite(args):
    """The same arguments for MLX's operations, which multiply what they do not look at by zero."""
    return tuple(mx.nan_to_num(x) if isinstance(x, mx.array) and x.ndim == 4 else x for x in args)


def check(backend, args):
    with launch.use(backend):
        actual = fused_few_queries(*args)
    assert_as_exact(actual, naive_few_queries(*finite(args)), exact(*args))


@pytest.fixture
def split(monkeypatch):
    """Few keys are split as many are."""
    monkeypatch.setattr(fused, "UNSPLIT_KEYS", 8)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("T", range(1, 9))
def test_any_number_of_queries(backend, T):
    check(backend, arguments(T=T))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(("T", "D", "heads"), [(1, 128, (8, 2)), (2, 96, (6, 3)), (3, 32, (5, 1)), (8, 64, (4, 4))])
def test_splits_are_merged(backend, T, D, heads, split):
    check(backend, arguments(T=T, D=D, HQ=heads[0], HKV=heads[1], L=900, offset=850, B=1))


@pytest.mark.parametrize("backend", CHECKED)
def test_splits_without_a_key_count_nothing(backend, split):
    check(backend, arguments(L=1200, offset=2, B=1))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 96, 256])
def test_heads_of_every_size(backend, dtype, D):
    check(backend, arguments(D=D, dtype=dtype, HKV=1, HQ=2))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("held", DTYPES)
def test_a_cache_of_another_dtype(backend, held):
    check(backend, arguments(held=held, dtype=mx.float32))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("offset", "start"),
    [(0, None), (66, None), ([41, 7], None), ([41, 11], [0, 30]), ([27, -3], [1, 31]), ([2, -40], [3, 45])],
)
@pytest.mark.parametrize("splits", [False, True])
def test_rows_of_different_lengths_and_queries_in_the_padding(backend, offset, start, splits, monkeypatch):
    monkeypatch.setattr(fused, "UNSPLIT_KEYS", 8 if splits else 1024)
    check(backend, arguments(offset=offset, start=start))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("T", "L"), [(1, 700), (4, 2000), pytest.param(8, 3000, marks=pytest.mark.slow)])
def test_the_shapes_of_mini(backend, T, L):
    check(backend, arguments(B=1, T=T, HQ=16, HKV=4, D=128, L=L, offset=L - 100))


def test_large_scores_do_not_overflow():
    q, k, *rest = arguments(dtype=mx.float32)
    for backend in (p.values[0] for p in FAST):
        if backend is not None:
            check(backend, (q * 300, k * 30, *rest))


KERNELS = {"few_queries": fused.KERNEL, "merge_splits": fused.MERGE}


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, kernel in KERNELS.items() for n in barriers(kernel)])
def test_a_missing_barrier_is_caught(name, n, split):
    args = arguments(dtype=mx.float32, L=600, offset=590, B=1, T=5)
    with mutated(KERNELS[name], (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: [fused_few_queries(*args)], [naive_few_queries(*finite(args))])


SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("n", range(fused.KERNEL.source()[1].count(SIMD_BARRIER)))
def test_a_missing_barrier_of_a_simdgroup_is_caught(n):
    args = arguments(dtype=mx.float32, L=900, offset=860, B=1, HQ=2, HKV=1)
    with mutated(fused.KERNEL, (SIMD_BARRIER, ""), occurrence=n):
        assert is_caught(lambda: [fused_few_queries(*args)], [naive_few_queries(*finite(args))])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("tiles = (end - first + 31) / 32", "tiles = (end - first) / 32"), "few_queries"),
        (("end = before + N", "end = before + N - 1"), "few_queries"),
        (("key <= own &&", "key < own &&"), "few_queries"),
        (("key <= own &&", "key <= own + 1 &&"), "few_queries"),
        (("key >= begin ||", "key > begin ||"), "few_queries"),
        (("n < 32 && from + n < end; n += 8", "n < 24 && from + n < end; n += 8"), "few_queries"),
        (("lane / 8, end - 1)", "lane / 8, end)"), "few_queries"),
        (("from + n + e, end - 1)", "from + n + e, end)"), "few_queries"),
        (("i < ROWS * D ? float", "i < ROWS * D - 1 ? float"), "few_queries"),
        (("i < SIMDGROUPS; i++) sum", "i < SIMDGROUPS - 1; i++) sum"), "few_queries"),
        (("j < SIMDGROUPS; j++", "j < SIMDGROUPS - 1; j++"), "few_queries"),
        (("i < metal::min(TOGETHER, ROWS - from) * D", "i < metal::min(TOGETHER, ROWS - from) * D - 1"), "few_queries"),
        (("s = simd; s < splits", "s = simd; s < splits - 1"), "merge_splits"),
        (("s = lane; s < splits; s += 32) {", "s = lane; s < splits - 1; s += 32) {"), "merge_splits"),
        (("d < D;", "d < D - 1;"), "merge_splits"),
        (("i < SIMDGROUPS;", "i <= SIMDGROUPS;"), "merge_splits"),
    ],
)
def test_a_bound_off_by_one_is_caught(change, name, split):
    q, k, v, *_ = arguments(dtype=mx.float32, L=600, T=5)
    args = q, k, v, mx.array([515, 505]), 0.3, mx.array([2, 12])
    with mutated(KERNELS[name], change):
        assert is_caught(lambda: [fused_few_queries(*args)], [naive_few_queries(*finite(args))])


@needs_simulator
@pytest.mark.parametrize("L", [300, 1100])
def test_as_cuda_text(L, split):
    compiled = {}
    args = arguments(B=1, HQ=4, HKV=2, T=3, D=128, L=L, offset=L - 30)
    with launch.use(recording_backend(compiled)):
        actual = fused_few_queries(*args)
    assert_as_exact(actual, naive_few_queries(*finite(args)), exact(*args))
    assert all(compiled.values())


def test_what_is_not_supported_is_refused():
    q, k, v, offset, scale, start = arguments()
    with pytest.raises(ValueError, match=r"\[few_queries\] no kernel for q \(2, 6, 4, 48\)"):
        fused_few_queries(*arguments(D=48))
    assert takes(fused_few_queries, q, k, v, offset, scale, start)
    assert not takes(fused_few_queries, *arguments(T=9))
    assert not takes(fused_few_queries, *arguments(HQ=4))
    assert not takes(fused_few_queries, q, k[:, :, :-1], v, offset, scale, start)
    assert not takes(fused_few_queries, q, k.astype(mx.float32), v, offset, scale, start)
    assert not takes(fused_few_queries, q, k, v, mx.array([1, 2, 3]), scale, start)
    assert not takes(fused_few_queries, q, k, v, offset, scale, mx.array([1]))
