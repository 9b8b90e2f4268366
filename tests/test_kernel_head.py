"""The kernel of the head: every format against float64, bounds and races checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.head import fused
from metal_kernels.head.fused import fused_head
from metal_kernels.head.naive import naive_head
from metal_kernels.packed import Matrices, Packed
from metal_kernels.twin.nvrtc import find_nvrtc
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.metal_sim.marks import needs_simulator
from tests.moe_cases import packed
from tests.test_kernels_as_cuda import recording_backend

EPS = 1e-6
CHECKED = backends()
FAST = backends("fast")
FOUR, EIGHT = ("affine", 4, 32), ("affine", 8, 32)
FORMS = [FOUR, ("affine", 4, 64), ("affine", 4, 128), EIGHT, ("affine", 8, 64), ("affine", 2, 64), ("affine", 6, 64)]
FORMS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("plain", 16, 0), ("plain", 32, 0)]


@pytest.fixture(autouse=True)
def several_tiles_a_threadgroup(monkeypatch):
    """As in a head of many rows."""
    monkeypatch.setattr(fused, "THREADGROUPS", {"metal": 2, "cuda": 2})


class Case:
    """A head of ``rows`` rows and some tokens; every axis has another size."""

    def __init__(self, form, shape=(3, 96), rows=50, *, x=mx.bfloat16, dtype=mx.bfloat16):
        keys = mx.random.split(mx.random.key(shape[-1]), 2)
        self.x = (mx.random.normal(shape, key=keys[0]) * 3 + 1).astype(x)
        self.weight = mx.random.uniform(0.5, 2, shape[-1:], key=keys[1]).astype(dtype)
        self.matrices = Matrices(packed((rows, shape[-1]), form, 0, dtype))

    @property
    def arguments(self):
        return self.x, self.weight, EPS, self.matrices

    def run(self):
        return [fused_head(*self.arguments)]

    def naive(self):
        return [naive_head(*self.arguments)]

    def exact(self):
        x, w = to_numpy(self.x), to_numpy(self.matrices.first.dequantize())
        return (x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * to_numpy(self.weight)) @ w.T


def check(backend, case):
    with launch.use(backend):
        (actual,) = case.run()
    assert_as_exact(actual, case.naive()[0], case.exact())


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_format(backend, form):
    check(backend, Case(form, (3, 96 if form[2] < 64 else 3 * form[2])))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mix_of_dtypes(backend, x, dtype):
    if backend.name == "cuda" and (x != dtype or x == mx.float32):
        pytest.skip("what is normed in float32 is MLX's on CUDA")
    check(backend, Case(FOUR, (2, 160), x=x, dtype=dtype))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 32), 9), ((2, 1, 416), 16), ((8, 64), 33), ((5, 1, 96), 300), ((1, 1, 1, 1056), 17)],
)
def test_widths_rows_and_batches_of_every_kind(backend, shape, rows):
    check(backend, Case(FOUR, shape, rows))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "width"), [(8, 2048), (3, 4096)])
def test_the_widths_of_mini_and_flash(backend, bits, tokens, width):
    check(backend, Case(("affine", bits, 64), (tokens, width), 272))


@pytest.mark.parametrize("backend", FAST)
def test_a_token_does_not_depend_on_the_others(backend):
    case = Case(FOUR, (6, 288), 40)
    with launch.use(backend):
        together, again = case.run()[0], case.run()[0]
        case.x = case.x[4:5]
        alone = case.run()[0]
    assert mx.array_equal(together, again)
    assert mx.array_equal(together[4:5], alone)


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
def test_a_missing_barrier_is_caught(n):
    case = Case(FOUR, (5, 416), 70)
    with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(case.run, case.naive())


FAULTS = [
    ("row), uint(N - 1))", "row), uint(N))", 0),
    ("unit + u, UNITS - 1)", "unit + u, UNITS)", 0),
    ("pair ^ 2", "pair ^ 1", 0),
    ("row < TOKENS", "row <= TOKENS", 0),
    ("row < TOKENS", "row < TOKENS - 1", 0),
    ("row < TOKENS", "row < TOKENS - 1", 1),
    ("unit + u < UNITS", "unit + u <= UNITS", 0),
    ("unit + u < UNITS", "unit + u < UNITS - 1", 1),
    ("i < SIMDGROUPS", "i < SIMDGROUPS - 1", 0),
    ("k < SIMDGROUPS", "k < SIMDGROUPS - 1", 0),
    ("m < PAIRS;", "m < PAIRS - 1;", 0),
    ("m < PAIRS;", "m < PAIRS - 1;", 1),
    ("tile % 2 * SIMDGROUPS", "0 * SIMDGROUPS", 0),
    ("(tile + 1) % 2 * FACTORS", "tile % 2 * FACTORS", 0),
    ("(a + 1) % AHEAD", "a % AHEAD", 0),
    ("start < TILES", "start < TILES - AHEAD", 0),
    ("first_row + AHEAD * 16", "first_row + 16", 0),
    ("(i * 8 + row) * PITCH", "row * PITCH", 0),
    ("at < COUNT", "at < COUNT - 1", 0),
    ("i < 16 * TOKENS", "i < 16 * TOKENS - 1", 0),
    ("n < N", "n <= N", 0),
    ("2 * pair + 1, 0", "2 * pair, 0", 0),
]


@pytest.mark.parametrize(("old", "new", "occurrence"), FAULTS)
def test_a_planted_fault_is_caught(old, new, occurrence):
    cases = Case(FOUR, (5, 416), 130), Case(FOUR, (8, 416), 300), Case(EIGHT, (1, 160), 16)
    with mutated(fused.KERNEL, (old, new), occurrence=occurrence):
        assert any(is_caught(case.run, case.naive()) for case in cases)


@needs_simulator
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (FOUR, mx.bfloat16),
        (("affine", 4, 64), mx.float16),
        (("affine", 8, 64), mx.bfloat16),
        (("mxfp8", 8, 32), mx.float16),
        (("plain", 16, 0), mx.bfloat16),
    ],
    ids=str,
)
def test_the_cuda_text_agrees_and_compiles(form, dtype):
    compiled = {}
    check(recording_backend(compiled), Case(form, (3, 192), x=dtype, dtype=dtype))
    if find_nvrtc() is None:
        pytest.skip("agrees, but NVRTC is not installed (pip's nvidia-cuda-nvrtc), so nothing was compiled")
    assert compiled["ring_head"]


def test_what_is_not_supported_is_refused():
    case = Case(FOUR)
    x, weight, eps, matrices = case.arguments
    assert takes(fused_head, x, weight, eps, matrices)
    assert not takes(fused_head, x, weight[:8], eps, matrices)
    assert not takes(fused_head, x.astype(mx.int32), weight, eps, matrices)
    assert not takes(fused_head, x[:0], weight, eps, matrices)
    assert not takes(fused_head, mx.zeros((9, 96)), weight, eps, matrices)
    assert not takes(fused_head, x[:, :64], weight[:64], eps, matrices)
    assert not takes(fused_head, x, weight, eps, Matrices(matrices.first, matrices.first))
    assert not takes(fused_head, x, weight, eps, Case(("affine", 3, 32)).matrices)
    assert not takes(fused_head, mx.zeros((1, 8192)), mx.zeros((8192,)), eps, Matrices(Packed(mx.zeros((9, 8192)))))
    with launch.use(launch.Backend("cuda", lambda **_: None)):
        assert takes(fused_head, x, weight, eps, matrices)
        assert not takes(fused_head, x.astype(mx.float32), weight, eps, matrices)
    with pytest.raises(ValueError, match=r"\[head\] no kernel for x \(9, 96\)"):
        fused_head(mx.zeros((9, 96)), weight, eps, matrices)
