"""The kernel of residual, norm and router: against float64, bounds and races checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.norm_router import fused
from metal_kernels.norm_router.fused import fused_add_norm, fused_norm_router
from metal_kernels.norm_router.naive import naive_add_norm, naive_norm_router
from metal_kernels.packed import Packed
from metal_kernels.twin.nvrtc import find_nvrtc
from tests.compare import relative_rms, to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, FLOAT32_ROUNDING, assert_as_exact
from tests.metal_sim.kernel import SimulatedKernel
from tests.metal_sim.marks import needs_simulator
from tests.moe_cases import packed
from tests.test_kernels_as_cuda import recording_backend

EPS = 1e-6
FLOAT32 = ("plain", 32, 0)


def arguments(
    shape=(2, 96), E=11, dtype=mx.bfloat16, r=mx.bfloat16, weight=None, form=FLOAT32, normed=None, router=mx.bfloat16
):
    keys = mx.random.split(mx.random.key(shape[-1]), 3)
    x = (mx.random.normal(shape, key=keys[0]) * 5 + 1).astype(dtype)
    added = None if r is None else (mx.random.normal(shape, key=keys[1]) * 3).astype(r)
    w = mx.random.uniform(0.5, 2, shape[-1:], key=keys[2]).astype(weight or dtype)
    return x, added, w, packed((E, shape[-1]), form, 3, router), EPS, normed


def exact_norm(x, r, weight, eps):
    x64 = to_numpy(x) if r is None else to_numpy(x) + to_numpy(r.astype(x.dtype))
    return x64, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * to_numpy(weight)


def assert_normed(actual, naive, exact):
    """As exact as the naive form, and the same to the bit but where float32 sums in another order tip a rounding."""
    assert_as_exact(actual, naive, exact)
    if actual.dtype != mx.float32:
        assert np.mean(to_numpy(actual) != to_numpy(naive)) < 0.02


def check(backend, args):
    with launch.use(backend):
        x_new, normed, logits = fused_norm_router(*args)
    naive = naive_norm_router(*args)
    x, r, weight, router, eps, _ = args
    _, normed64 = exact_norm(x, r, weight, eps)
    assert x_new.dtype == x.dtype
    assert mx.array_equal(x_new, naive[0])
    assert_normed(normed, naive[1], normed64)
    assert_as_exact(logits, naive[2], normed64 @ to_numpy(router.dequantize()).T)


# Each array is converted where it is loaded, by itself: each pair of dtypes is there, not each triple.
MIXES = [
    (dtype, r, (mx.float32, mx.bfloat16)[(i + j) % 2])
    for i, dtype in enumerate(DTYPES)
    for j, r in enumerate([None, *DTYPES])
]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("dtype", "r", "weight"), MIXES, ids=str)
def test_every_mix_of_dtypes(backend, dtype, r, weight):
    check(backend, arguments(dtype=dtype, r=r, weight=weight))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_reads_what_the_norm_returns(backend, dtype):
    """Not the exact norm, nor the copy in the dtype of the experts."""
    args = arguments((3, 160), dtype=dtype)
    with launch.use(backend):
        _, normed, logits = fused_norm_router(*args)
        _, rounded, same = fused_norm_router(*args[:-1], mx.float16)
    assert mx.array_equal(logits, same)
    assert mx.array_equal(normed.astype(mx.float16), rounded)
    router = args[3].dequantize()
    expected = to_numpy(normed) @ to_numpy(router).T
    allowed = 2 * relative_rms(normed.astype(mx.float32) @ router.T, expected) + FLOAT32_ROUNDING
    assert relative_rms(logits, expected) <= allowed


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "form", [FLOAT32, ("plain", 16, 0), ("affine", 8, 32), ("affine", 4, 64), ("mxfp8", 8, 32)], ids=str
)
@pytest.mark.parametrize("router", [mx.bfloat16, mx.float16])
def test_every_format_of_the_router(backend, form, router):
    check(backend, arguments((3, 192), 7, form=form, router=router))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("tokens", range(1, 9))
def test_one_to_eight_tokens(backend, tokens):
    check(backend, arguments((tokens, 264), 9))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("shape", "E"),
    [((1, 8), 1), ((2, 3, 70), 3), ((1, 4, 21), 5), ((7, 1, 100), 4), ((1, 259), 13), ((2, 2, 2, 520), 2)],
)
def test_widths_and_batches_of_every_kind(backend, shape, E):
    check(backend, arguments(shape, E))


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("hidden", [2048, 2056, 4096, 5000, 8192])
@pytest.mark.parametrize("tokens", [1, 7, 8])
def test_real_widths(backend, hidden, tokens):
    check(backend, arguments((tokens, hidden), 30, weight=mx.bfloat16))


@pytest.mark.parametrize("backend", backends("fast"))
def test_the_shape_of_mini(backend):
    check(backend, arguments((1, 1, 2048), 256, r=None))


@pytest.mark.parametrize("backend", backends("fast"))
def test_a_residual_stream_in_float32(backend):
    args = arguments((1, 1, 2048), 32, dtype=mx.float32, r=mx.bfloat16, weight=mx.bfloat16, normed=mx.bfloat16)
    with launch.use(backend):
        x_new, normed, logits = fused_norm_router(*args)
    assert (x_new.dtype, normed.dtype, logits.dtype) == (mx.float32, mx.bfloat16, mx.float32)
    check(backend, args)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (2, 5, 70), (13, 21), (1, 1, 520)])
def test_norm_without_router(backend, dtype, shape):
    x, r, weight, _, eps, _ = arguments(shape, dtype=dtype)
    for result in (None, mx.float16):
        with launch.use(backend):
            x_new, normed = fused_add_norm(x, r, weight, eps, result)
        naive = naive_add_norm(x, r, weight, eps, result)
        assert mx.array_equal(x_new, naive[0])
        assert_normed(normed, naive[1], exact_norm(x, r, weight, eps)[1])


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_norm_of_many_tokens(backend, tokens):
    x, r, weight, _, eps, _ = arguments((tokens, 2048))
    with launch.use(backend):
        x_new, normed = fused_add_norm(x, r, weight, eps)
    naive = naive_add_norm(x, r, weight, eps)
    assert mx.array_equal(x_new, naive[0])
    assert_normed(normed, naive[1], exact_norm(x, r, weight, eps)[1])


@needs_simulator
@pytest.mark.parametrize("r", [None, mx.bfloat16])
def test_every_element_is_written_once_somewhere(r):
    for backend in backends():
        if backend.id.startswith("check"):
            with launch.use(backend.values[0]):
                fused_norm_router(*arguments((7, 100), 5, r=r))
            assert SimulatedKernel.last.unwritten == ({} if r is not None else {"x_new": 1})


@pytest.mark.parametrize("backend", backends("fast"))
def test_runs_are_bit_equal_and_do_not_depend_on_the_other_tokens(backend):
    x, r, weight, router, eps, _ = arguments((6, 264), 9)
    with launch.use(backend):
        first, second = (fused_norm_router(x, r, weight, router, eps) for _ in range(2))
        alone = fused_norm_router(x[4:5], r[4:5], weight, router, eps)
    for a, b, c in zip(first, second, alone, strict=True):
        assert mx.array_equal(a, b)
        assert mx.array_equal(a[4:5], c)


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
def test_a_missing_barrier_is_caught(n):
    args = arguments((2, 520), 5)
    with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_norm_router(*args), naive_norm_router(*args))


@pytest.mark.parametrize(
    ("old", "new", "occurrence"),
    [
        ("at < K)", "at <= K)", 0),
        ("at < K)", "at <= K)", 1),
        ("at < K)", "at <= K)", 2),
        ("at < K)", "at <= K)", 3),
        ("at < K)", "at < K - P)", 1),
        ("at < K)", "at < K - P)", 3),
        ("n, E - 1)", "n, E)", 0),
        ("count - 1)", "count)", 0),
        ("token < count && row", "token <= count && row", 0),
        ("row < E)", "row <= E)", 0),
        ("t < count &&", "t <= count &&", 0),
        ("t < EACH", "t < EACH - 1", 0),
        ("t < EACH", "t < EACH - 1", 1),
        ("n < ROWS", "n < ROWS - 1", 0),
        ("n < ROWS", "n < ROWS - 1", 2),
        ("n < ROWS", "n < ROWS - 1", 3),
        ("s < SIMDGROUPS", "s < SIMDGROUPS - 1", 0),
        ("s < SIMDGROUPS", "s < SIMDGROUPS - 1", 1),
        ("s < SIMDGROUPS", "s <= SIMDGROUPS", 0),
        ("i < EACH * ROWS", "i < EACH * ROWS - 1", 0),
        ("i < STEPS", "i < STEPS - 1", 2),
        ("t % threadgroups_per_grid.y ==", "t % (threadgroups_per_grid.y + 1) ==", 0),
        ("i < P;", "i < P - 1;", 0),
        ("i < NW; i += 2", "i < NW - 2; i += 2", 0),
    ],
)
def test_a_bound_off_by_one_is_caught(old, new, occurrence):
    args = arguments((7, 268), 9)
    with mutated(fused.KERNEL, (old, new), occurrence=occurrence):
        assert is_caught(lambda: fused_norm_router(*args), naive_norm_router(*args))


@needs_simulator
@pytest.mark.parametrize(
    "args",
    [
        arguments((1, 520), 9),
        arguments((5, 70), 6, r=None, form=("plain", 16, 0)),
        arguments((7, 264), 9, dtype=mx.float32, normed=mx.float16),
        arguments((2, 96), 9, form=("affine", 8, 32)),
    ],
    ids=["mini", "odd", "float32", "packed"],
)
def test_the_cuda_text_agrees_and_compiles(args):
    compiled = {}
    check(recording_backend(compiled), args)
    x, r, weight, _, eps, normed = args
    if r is not None:
        with launch.use(recording_backend(compiled)):
            results = fused_add_norm(x, r, weight, eps, normed)
        for actual, naive in zip(results, naive_add_norm(x, r, weight, eps, normed), strict=True):
            assert relative_rms(actual, naive) < 1e-3
    if find_nvrtc() is None:
        pytest.skip("agrees, but NVRTC is not installed (pip's nvidia-cuda-nvrtc), so nothing was compiled")
    assert compiled["ring_norm_router"]


def test_what_is_not_supported_is_refused():
    x, r, weight, router, eps, _ = arguments((8, 96))
    assert takes(fused_norm_router, x, r, weight, router, 1e-6)
    assert takes(fused_norm_router, x, None, weight, router, 1e-6, mx.float16)
    assert takes(fused_add_norm, x, r, weight, 1e-6)
    assert not takes(fused_norm_router, x, r[:1], weight, router, 1e-6)
    assert not takes(fused_norm_router, x, r.astype(mx.int32), weight, router, 1e-6)
    assert not takes(fused_norm_router, x, r, weight[:8], router, 1e-6)
    assert not takes(fused_norm_router, x, r, weight, router, 1e-6, mx.int32)
    assert not takes(fused_norm_router, x, r, weight, packed((5, 64), FLOAT32, 0), 1e-6)
    assert not takes(fused_norm_router, x, r, weight, packed((5, 96), ("affine", 6, 32), 0), 1e-6)
    assert not takes(fused_norm_router, x, r, weight, packed((2, 5, 96), FLOAT32, 0), 1e-6)
    assert not takes(fused_norm_router, x[:0], r[:0], weight, router, 1e-6)
    assert not takes(fused_norm_router, mx.zeros((9, 96)), None, weight, router, 1e-6)
    assert not takes(fused_norm_router, mx.zeros((1, 8200)), None, mx.zeros((8200,)), Packed(mx.zeros((2, 8200))), 1e-6)
    assert not takes(fused_add_norm, x, r, weight[:8], 1e-6)
    with pytest.raises(ValueError, match=r"\[norm_router\] no kernel for x \(9, 96\)"):
        fused_norm_router(mx.zeros((9, 96)), None, weight, router, eps)
    with pytest.raises(ValueError, match=r"\[add_norm\] no kernel for x \(8, 96\)"):
        fused_add_norm(x, r, weight[:8], eps)
