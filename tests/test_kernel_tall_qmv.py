"""The fused products on simdgroup matrices: every format against float64, bounds and races checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_kernels import choices, launch
from metal_kernels.fused_qmv import naive, tall
from metal_kernels.fused_qmv.fused import fused_head
from metal_kernels.fused_qmv.naive import naive_head
from metal_kernels.packed import Matrices, Packed
from metal_kernels.twin.nvrtc import find_nvrtc
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.metal_sim.marks import needs_simulator
from tests.test_kernel_fused_qmv import EIGHT, EPS, FOUR, Case, check, check_products
from tests.test_kernels_as_cuda import recording_backend

CHECKED = backends()
FAST = backends("fast")
FORMS = [FOUR, ("affine", 4, 64), ("affine", 4, 128), EIGHT, ("affine", 8, 64), ("affine", 2, 64), ("affine", 6, 64)]
FORMS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("plain", 16, 0), ("plain", 32, 0)]


@pytest.fixture(autouse=True)
def is_chosen(monkeypatch):
    """Each product of two tokens or more goes through this kernel, and a threadgroup takes as many tiles as it may."""
    for sizes in ("LAYER", "HEAD"):
        monkeypatch.setattr(tall, sizes, getattr(tall, sizes)._replace(threadgroups={"metal": 1, "cuda": 1}))
    operations = ("norm_qmv", "gate_qmv", "add_qmv")
    with choices.use({f"{name}/{size}": choices.TALL for name in operations for size in (choices.FEW, choices.EIGHT)}):
        yield


def is_taken(case):
    return all(cut(case.both, groups, case.dtype) for groups in (1, case.groups))


def cut(matrices, groups, dtype):
    return tall.cut("norm_qmv", matrices, 2, groups, dtype)


def check_head(backend, case):
    """Of the first matrix."""
    with launch.use(backend):
        found = fused_head(case.x, case.weight, EPS, case.one)
    assert_as_exact(found, naive_head(case.x, case.weight, EPS, case.one), case.exact()[0])


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_format(backend, form):
    case = Case(form, (3, 96 if form[2] < 64 else 3 * form[2]))
    assert is_taken(case)
    check_products(backend, case)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(("x", "dtype"), [*((x, mx.bfloat16) for x in DTYPES), *((mx.float32, d) for d in DTYPES)])
def test_every_mix_of_dtypes(backend, x, dtype):
    check(backend, Case(FOUR, (2, 160), groups=5, x=x, dtype=dtype, residual=x))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("shape", "groups", "sizes", "threadgroups"),
    [
        ((2, 32), 1, (9, 33), 1),
        ((2, 3, 416), 13, (16, 70), 8),
        ((8, 64), 2, (300, 17), 8),
        ((5, 1, 1056), 3, (17, 48), 1),
    ],
)
def test_widths_groups_and_batches_of_every_kind(backend, shape, groups, sizes, threadgroups, monkeypatch):
    monkeypatch.setattr(tall, "LAYER", tall.LAYER._replace(threadgroups={"metal": threadgroups}))
    case = Case(FOUR, shape, sizes, groups=groups, residual=mx.bfloat16)
    assert is_taken(case)
    check(backend, case)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(("shape", "rows"), [((1, 32), 9), ((2, 1, 416), 16), ((8, 64), 33), ((1, 1, 1, 1056), 300)])
def test_the_head_takes_one_to_eight_tokens(backend, shape, rows):
    check_head(backend, Case(FOUR, shape, (rows,), groups=1))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (8, 4096)])
def test_the_heads_of_mini_and_flash(backend, tokens, width):
    check_head(backend, Case(("affine", 4, 64), (tokens, width), (272,), groups=1))


def test_what_the_head_does_not_take_is_refused():
    case = Case(FOUR)
    assert takes(fused_head, case.x, case.weight, EPS, case.one)
    assert not takes(fused_head, case.x, case.weight, EPS, case.both)
    assert not takes(fused_head, mx.zeros((9, 96)), case.weight, EPS, case.one)
    assert not takes(fused_head, case.x, case.weight, EPS, Case(("affine", 3, 32)).one)
    with launch.use(launch.Backend("cuda", lambda **_: None)):
        assert takes(fused_head, case.x, case.weight, EPS, case.one)
        assert not takes(fused_head, case.x.astype(mx.float32), case.weight, EPS, case.one)
    with pytest.raises(ValueError, match=r"\[head\] no kernel for x \(9, 96\)"):
        fused_head(mx.zeros((9, 96)), case.weight, EPS, case.one)


def test_a_head_of_very_many_rows_is_unpacked_in_parts(monkeypatch):
    case = Case(FOUR)
    whole = naive_head(case.x, case.weight, EPS, case.one)
    monkeypatch.setattr(naive, "ROWS", 16)
    assert mx.allclose(naive_head(case.x, case.weight, EPS, case.one), whole, rtol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("bits", "tokens", "width"), [(4, 8, 2048), (8, 3, 2048), (4, 4, 4096)])
def test_the_widths_of_mini_and_flash(backend, bits, tokens, width):
    check(backend, Case(("affine", bits, 64), (tokens, width), (160, 72), groups=4, residual=mx.bfloat16))


@pytest.mark.parametrize("backend", FAST)
def test_runs_are_bit_equal_and_do_not_depend_on_the_other_tokens(backend):
    case = Case(FOUR, (6, 288), (40, 21), groups=3, residual=mx.bfloat16)
    with launch.use(backend):
        together, again = case.run(), case.run()
        case.x, case.gate, case.residual = case.x[3:5], case.gate[3:5], case.residual[3:5]
        two = case.run()
    for a, b, c in zip(together, again, two, strict=True):
        assert mx.array_equal(a, b)
        assert mx.array_equal(a[3:5], c)


@pytest.mark.parametrize("backend", FAST)
def test_what_it_does_not_take_goes_to_the_other_kernel(backend):
    wide = Matrices(Packed(mx.zeros((9, 8192))))
    assert cut(wide, 1, mx.float32) is None
    assert cut(Case(("affine", 3, 32)).both, 1, mx.bfloat16) is None
    assert cut(Case(FOUR, (2, 96)).both, 2, mx.bfloat16) is None  # 48 values a group
    with launch.use(launch.Backend("cuda", lambda **_: None)):
        assert cut(Case(FOUR).both, 1, mx.float32) is None
    check(backend, Case(FOUR, (2, 96), groups=2))


CASES = [
    (FOUR, (5, 416), (70, 40), 1),
    (FOUR, (8, 384), (300, 33), 3),
    (EIGHT, (2, 160), (16, 9), 5),
]


@pytest.mark.parametrize("n", barriers(tall.KERNEL))
def test_a_missing_barrier_is_caught(n):
    caught = False
    for run, right in Case(*CASES[0][:3], groups=1).each():
        with mutated(tall.KERNEL, (BARRIER, ""), occurrence=n):
            caught |= is_caught(run, right)
    assert caught


FAULTS = [
    ("row), rows - 1)", "row), rows)", 0),
    ("unit + u, UNITS - 1)", "unit + u, UNITS)", 0),
    ("pair ^ 2", "pair ^ 1", 0),
    ("row < TOKENS", "row <= TOKENS", 0),
    ("row < TOKENS", "row < TOKENS - 1", 0),
    ("row < TOKENS", "row < TOKENS - 1", 1),
    ("unit + u < UNITS", "unit + u <= UNITS", 0),
    ("part < SQUARES", "part <= SQUARES", 0),
    ("u == OWN - 1", "u == OWN", 0),
    ("unit + u < UNITS", "unit + u < UNITS - 1", 1),
    ("i < PARTS", "i < PARTS - 1", 0),
    ("/ PARTS * PARTS", "/ PARTS", 0),
    ("|| GROUPS > 1", "", 0),
    ("place >= FIRST", "place > FIRST", 0),
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
    ("n < rows", "n <= rows", 0),
    ("2 * pair + 1, 0", "2 * pair, 0", 0),
    ("if (HAS_RESIDUAL)", "if (false)", 0),
]


@pytest.mark.parametrize(("old", "new", "occurrence"), FAULTS)
def test_a_planted_fault_is_caught(old, new, occurrence):
    cases = [Case(form, shape, sizes, groups=groups, residual=mx.float32) for form, shape, sizes, groups in CASES]
    with mutated(tall.KERNEL, (old, new), occurrence=occurrence):
        assert any(is_caught(run, right) for case in cases for run, right in case.each())


@needs_simulator
@pytest.mark.parametrize("form", [FOUR, ("affine", 8, 64), ("mxfp8", 8, 32), ("plain", 16, 0)], ids=str)
def test_the_cuda_text_agrees_and_compiles(form):
    compiled = {}
    check(recording_backend(compiled), Case(form, (3, 192), residual=mx.float32))
    if find_nvrtc() is None:
        pytest.skip("agrees, but NVRTC is not installed (pip's nvidia-cuda-nvrtc), so nothing was compiled")
    assert compiled["ring_tall_qmv"]
