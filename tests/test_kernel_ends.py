"""The kernels that a step begins and ends with: every format, ties, NaN, bounds checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.ends import fused
from metal_kernels.ends.fused import fused_embed, fused_peak
from metal_kernels.ends.naive import naive_embed, naive_peak
from metal_kernels.twin.nvrtc import find_nvrtc
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES
from tests.metal_sim.marks import needs_simulator
from tests.moe_cases import MICRO, QUICK, packed
from tests.test_kernels_as_cuda import recording_backend

CHECKED = backends()
TOKENS = mx.array([[3, 0, 17]])


def numbers(rows=3, n=210, dtype=mx.bfloat16):
    return (mx.random.normal((rows, n), key=mx.random.key(n)) * 3).astype(dtype)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", [*sorted(QUICK), *MICRO], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_format(backend, form, dtype):
    matrix = packed((18, 3 * max(form[2], 32)), form, 1)
    with launch.use(backend):
        y = fused_embed(TOKENS, matrix, dtype)
    assert (y.shape, y.dtype) == ((1, 3, matrix.shape[1]), dtype)
    assert np.allclose(to_numpy(y), to_numpy(naive_embed(TOKENS, matrix, dtype)), rtol=2**-7, atol=1e-6)
    right = to_numpy(matrix.dequantize())[[3, 0, 17]]
    assert np.allclose(to_numpy(y)[0], right, rtol={2: 2**-8, 4: 2**-20}[dtype.size], atol=1e-6)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("kind", [mx.int32, mx.uint32, mx.int64])
def test_tokens_of_every_type(backend, kind):
    matrix = packed((18, 64), ("affine", 4, 32), 1)
    with launch.use(backend):
        y = fused_embed(TOKENS.astype(kind), matrix, mx.float32)
    assert np.allclose(to_numpy(y), to_numpy(naive_embed(TOKENS, matrix, mx.float32)), rtol=1e-6)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 210, 1023, 3200])
def test_the_largest(backend, dtype, n):
    x = numbers(n=n, dtype=dtype)
    with launch.use(backend):
        place, largest = fused_peak(x)
    right = naive_peak(x)
    assert place.dtype == mx.uint32
    assert largest.dtype == mx.float32
    assert mx.array_equal(place, right[0])
    assert mx.array_equal(largest, right[1])


@pytest.mark.parametrize("backend", CHECKED)
def test_ties_signs_of_zero_and_what_is_not_finite(backend):
    x = mx.full((6, 96), -5.0)
    x[0, 40] = x[0, 41] = x[0, 90] = 2.0
    x[1] = -mx.inf
    x[2, 7] = -0.0
    x[2, 70] = 0.0
    x[3, 33] = mx.inf
    x[4, 50] = -mx.nan
    x[4, 3] = mx.inf
    with launch.use(backend):
        place, largest = fused_peak(x)
    assert place.tolist() == [40, 0, 7, 33, 50, 0]
    assert largest.tolist()[:4] == [2.0, -np.inf, 0.0, np.inf]
    assert np.isnan(largest.tolist()[4])
    assert largest.tolist()[5] == -5.0


@pytest.mark.parametrize("n", barriers(fused.PEAK))
def test_a_missing_barrier_is_caught(n):
    x = numbers(n=1024)
    with mutated(fused.PEAK, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_peak(x), naive_peak(x))


@pytest.mark.parametrize(
    "change",
    [
        ("i < N;", "i < N - P;"),
        ("i < N;", "i <= N;"),
        ("other > key", "other >= key"),
        ("e < P", "e < P - 1"),
        ("int(lane) < SIMDGROUPS ? keys", "int(lane) < SIMDGROUPS - 1 ? keys"),
        ("best ^ 0x80000000u", "best"),
    ],
)
def test_a_fault_in_the_largest_is_caught(change):
    x = mx.concatenate([mx.zeros((1, 1024)), mx.arange(1024)[None] == 1023, -1 - mx.arange(1024.0)[None]])
    with mutated(fused.PEAK, change):
        assert is_caught(lambda: fused_peak(x), naive_peak(x))


@pytest.mark.parametrize(
    "change",
    [
        ("block < K / 32", "block < K / 32 - 1"),
        ("block < K / 32", "block <= K / 32"),
        ("i += 8) store", "i += 16) store"),
        ("uint(N - 1)", "uint(N)"),
    ],
)
def test_a_fault_in_rows_is_caught(change):
    matrix, tokens = packed((18, 96), ("affine", 4, 32), 1), mx.array([3, 40])
    right = naive_embed(mx.array([3, 17]), matrix, mx.float32)
    with mutated(fused.EMBED, change):
        assert is_caught(lambda: [fused_embed(tokens, matrix, mx.float32)], [right])


@needs_simulator
def test_the_cuda_text_agrees_and_compiles():
    compiled, x, matrix = {}, numbers(), packed((18, 64), ("affine", 4, 32), 1)
    with launch.use(recording_backend(compiled)):
        assert mx.array_equal(fused_peak(x)[0], naive_peak(x)[0])
        y = fused_embed(TOKENS, matrix, mx.bfloat16)
    assert np.allclose(to_numpy(y), to_numpy(naive_embed(TOKENS, matrix, mx.bfloat16)), rtol=2**-7)
    if find_nvrtc() is not None:
        assert compiled["ring_peak"]
        assert compiled["ring_embed"]


def test_what_is_not_supported_is_refused():
    matrix = packed((18, 64), ("affine", 4, 32), 1)
    assert takes(fused_embed, TOKENS, matrix, mx.bfloat16)
    assert not takes(fused_embed, mx.arange(9), matrix, mx.bfloat16)
    assert not takes(fused_embed, TOKENS.astype(mx.float32), matrix, mx.bfloat16)
    assert not takes(fused_embed, TOKENS, packed((18, 64), ("plain", 16, 0), 1), mx.bfloat16)
    assert takes(fused_peak, numbers())
    assert not takes(fused_peak, numbers().astype(mx.int32))
    assert not takes(fused_peak, numbers(1, 7))
