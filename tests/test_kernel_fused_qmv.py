"""The kernel of fused products: every format against float64, bounds and races checked, faults caught, as CUDA text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import choices, dispatch, launch
from metal_kernels.fused_qmv import fused
from metal_kernels.fused_qmv.fused import fused_add_qmv, fused_gate_qmv, fused_norm_qmv
from metal_kernels.fused_qmv.naive import naive_add_qmv, naive_gate_qmv, naive_norm_qmv
from metal_kernels.packed import Matrices, Packed
from metal_kernels.twin.nvrtc import find_nvrtc
from tests.compare import to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.metal_sim.marks import needs_simulator
from tests.moe_cases import EVERY_FORMAT, MICRO, PLAIN, packed
from tests.test_kernels_as_cuda import recording_backend

EPS = 1e-6
CHECKED = backends()
FAST = backends("fast")
FOUR, EIGHT = ("affine", 4, 32), ("affine", 8, 32)


class Case:
    """Matrices of one layer and some tokens; every axis has another size unless a test asks otherwise."""

    def __init__(
        self, form, shape=(2, 96), sizes=(38, 21), *, groups=3, x=mx.bfloat16, dtype=mx.bfloat16, residual=None
    ):
        keys = mx.random.split(mx.random.key(shape[-1]), 4)
        self.x = (mx.random.normal(shape, key=keys[0]) * 3 + 1).astype(x)
        self.gate = (mx.random.normal(shape, key=keys[1]) * 2).astype(dtype)
        self.weight = mx.random.uniform(0.5, 2, shape[-1:], key=keys[2]).astype(dtype)
        self.groups, self.dtype = groups, dtype
        weights = [packed((n, shape[-1]), form, i, dtype) for i, n in enumerate(sizes)]
        self.both, self.one = Matrices(*weights), Matrices(weights[0])
        self.residual = None
        if residual is not None:
            self.residual = mx.random.normal((*shape[:-1], sizes[0]), key=keys[3]).astype(residual)

    @property
    def normed(self):
        return self.x, self.weight, EPS, self.both, self.dtype

    @property
    def gated(self):
        return self.x, self.gate, self.weight, self.groups, EPS, self.one, self.residual

    @property
    def added(self):
        return self.x, self.one, self.residual

    def exact(self):
        """Results of all three operations in float64."""
        x, weight = to_numpy(self.x), to_numpy(self.weight)
        first, *second = (to_numpy(w.dequantize()).T for w in self.both.all)
        residual = 0 if self.residual is None else to_numpy(self.residual)
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        gated = (grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + EPS)).reshape(x.shape) * weight
        gated /= 1 + np.exp(-to_numpy(self.gate))
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
        return [*(normed @ w for w in (first, *second)), gated @ first + residual, x @ first + residual]

    def run(self):
        """The same by the kernel."""
        return [*fused_norm_qmv(*self.normed), fused_gate_qmv(*self.gated), fused_add_qmv(*self.added)]

    def each(self):
        """Each operation by the kernel, and what the plain form gives."""
        naive = self.naive()
        yield lambda: fused_norm_qmv(*self.normed), naive[:2]
        yield lambda: [fused_gate_qmv(*self.gated)], naive[2:3]
        yield lambda: [fused_add_qmv(*self.added)], naive[3:]

    def naive(self):
        """The same by the plain forms."""
        return [*naive_norm_qmv(*self.normed), naive_gate_qmv(*self.gated), naive_add_qmv(*self.added)]


def check(backend, case):
    with launch.use(backend):
        results = case.run()
    for actual, naive, exact in zip(results, case.naive(), case.exact(), strict=True):
        assert_as_exact(actual, naive, exact)


def check_products(backend, case):
    """Of both matrices, behind a norm: weights are unpacked after it, so a format cannot tell one operation from another."""
    with launch.use(backend):
        results = fused_norm_qmv(*case.normed)
    for actual, naive, exact in zip(results, naive_norm_qmv(*case.normed), case.exact()[:2], strict=True):
        assert_as_exact(actual, naive, exact)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", EVERY_FORMAT, ids=str)
def test_every_format(backend, form):
    check_products(backend, Case(form, (2, 96 if form[2] < 64 else 3 * form[2])))


# x is read and rounded before any weight is unpacked: each pair of form, x and dtype is there, not each triple.
MIXES = [(FOUR, x, dtype) for x in DTYPES for dtype in DTYPES]
MIXES += [
    (form, DTYPES[i], DTYPES[(i + n) % 3])
    for n, form in enumerate([EIGHT, ("affine", 5, 32), ("plain", 32, 0)])
    for i in range(3)
]


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(("form", "x", "dtype"), MIXES, ids=str)
def test_every_mix_of_dtypes(backend, form, x, dtype):
    check(backend, Case(form, (3, 160), groups=5, x=x, dtype=dtype, residual=mx.float32))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("residual", [None, *DTYPES])
def test_the_residual_is_added_before_the_only_rounding(backend, residual):
    case = Case(FOUR, residual=residual)
    check(backend, case)
    with launch.use(backend):
        assert fused_gate_qmv(*case.gated).dtype == fused_add_qmv(*case.added).dtype == (residual or mx.bfloat16)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])  # a count of turns of one loop
def test_one_to_eight_tokens(backend, tokens):
    check(backend, Case(FOUR, (tokens, 96), residual=mx.float32))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "sizes"),
    [
        ((1, 32), 1, (9, 33)),
        ((2, 3, 64), 32, (16, 4)),
        ((2, 1, 1056), 4, (17, 5)),
        ((1, 1, 1, 1120), 7, (33, 16)),
        ((1, 2080), 26, (8, 18)),
    ],
)
def test_widths_groups_and_batches_of_every_kind(backend, form, shape, groups, sizes):
    check(backend, Case(form, shape, sizes, groups=groups))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_widths_of_mini(backend, bits, tokens):
    check(backend, Case(("affine", bits, 64), (1, tokens, 2048), (160, 72), groups=4, residual=mx.bfloat16))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("form", "width"), [(("affine", 4, 64), 4096), (("affine", 8, 128), 8192), (PLAIN[0], 4096)])
def test_wider_ones(backend, form, width):
    check(backend, Case(form, (8, width), (40, 24), groups=8, residual=mx.bfloat16))


@pytest.mark.parametrize("backend", FAST)
def test_a_residual_stream_in_float32(backend):
    case = Case(("affine", 4, 64), (1, 1, 1024), groups=4, x=mx.float32, residual=mx.float32)
    check(backend, case)
    with launch.use(backend):
        first, second = fused_norm_qmv(*case.normed)
    assert first.dtype == second.dtype == mx.bfloat16


@pytest.mark.parametrize("backend", FAST)
def test_gates_far_open_and_far_shut_stay_finite(backend):
    case = Case(FOUR, (2, 96), dtype=mx.float32)
    case.gate = mx.where(mx.arange(96) % 2 == 0, 200.0, -200.0) * mx.ones(case.x.shape)
    with launch.use(backend):
        y = fused_gate_qmv(*case.gated)
    with np.errstate(over="ignore"):
        assert_as_exact(y, naive_gate_qmv(*case.gated), case.exact()[2])


@pytest.mark.parametrize("backend", FAST)
def test_runs_are_bit_equal_and_do_not_depend_on_the_other_tokens(backend):
    case = Case(FOUR, (6, 1056), groups=4, residual=mx.bfloat16)
    with launch.use(backend):
        first, second = case.run(), case.run()
        case.x, case.gate, case.residual = case.x[4:5], case.gate[4:5], case.residual[4:5]
        alone = case.run()
    for a, b, c in zip(first, second, alone, strict=True):
        assert mx.array_equal(a, b)
        assert mx.array_equal(a[4:5], c)


@pytest.mark.parametrize("n", barriers(fused.KERNEL))
@pytest.mark.parametrize("form", [FOUR, PLAIN[0]], ids=str)
def test_a_missing_barrier_is_caught(n, form):
    for run, right in Case(form, (5, 1056), groups=1).each():  # more than are multiplied together
        with mutated(fused.KERNEL, (BARRIER, ""), occurrence=n):
            assert is_caught(run, right)


FAULTS = [
    ("unit < UNITS", "unit <= UNITS", 0),
    ("unit < UNITS", "unit < UNITS - 1", 0),
    ("unit < UNITS", "unit < UNITS - 1", 1),
    ("channel < SIZE", "channel <= SIZE", 0),
    ("channel < SIZE", "channel <= SIZE", 1),
    ("channel < SIZE", "channel < SIZE - P", 0),
    ("channel < SIZE", "channel < SIZE - P", 1),
    ("i < SPLIT", "i < SPLIT - 1", 0),
    ("rows - 1)", "rows)", 0),
    ("member, BLOCKS - 1)", "member, BLOCKS)", 0),
    ("member, BLOCKS - 1)", "member, BLOCKS)", 1),
    ("member < BLOCKS;", "member <= BLOCKS;", 0),
    ("n < ROWS", "n < ROWS - 1", 0),
    ("n < ROWS", "n < ROWS - 1", 2),
    ("n < ROWS", "n < ROWS - 1", 3),
    ("t < TOKENS", "t < TOKENS - 1", 0),
    ("start < TOKENS", "start < TOKENS - 1", 0),
    ("k < TOGETHER", "k < TOGETHER - 1", 0),
    ("k < TOGETHER", "k < TOGETHER - 1", 1),
    ("from < STEP;", "from < STEP - CHUNK;", 0),
    ("i < CHUNK;", "i < CHUNK - 1;", 1),
    ("n < ROWS * TOKENS; n++) {", "n < ROWS * TOKENS - 1; n++) {", 0),
    ("t < TOKENS; t++) {\n      uint", "t < TOKENS - 1; t++) {\n      uint", 0),
    ("i < TOKENS * OWNED", "i < TOKENS * OWNED - 1", 0),
    ("row < rows", "row <= rows", 0),
    ("k < TEAM", "k < TEAM - 1", 0),
    ("index >= FIRST", "index > FIRST", 0),
    ("i < NW / 4", "i < NW / 4 - 1", 0),
    ("i < NW / 4", "i < NW / 4 - 1", 1),
    ("i < STEP;", "i < STEP - 1;", 0),
    ("i < STEP;", "i < STEP - 1;", 1),
    ("end / EACH - 1", "end / EACH", 0),
    ("EACH + e, end - 1", "EACH + e, end", 0),
    ("(ROWS * PER_ROW + EACH - 1) / EACH", "(ROWS * PER_ROW - 1) / EACH", 0),
]


@pytest.mark.parametrize(("old", "new", "occurrence"), FAULTS)
def test_a_planted_fault_is_caught(old, new, occurrence):
    # One token, several, and scales that whole words do not hold.
    cases = Case(FOUR, (1, 1056), (38, 32), groups=3), Case(FOUR, (3, 1056), (38, 32), groups=3), Case(FOUR)
    with mutated(fused.KERNEL, (old, new), occurrence=occurrence):
        assert any(is_caught(run, right) for case in cases for run, right in case.each())


@needs_simulator
@pytest.mark.parametrize("form", [FOUR, ("affine", 8, 64), ("affine", 3, 32), *MICRO, *PLAIN], ids=str)
def test_the_cuda_text_agrees_and_compiles(form):
    compiled = {}
    agrees = check if form in (FOUR, PLAIN[0]) else check_products
    with choices.use({f"{name}/{choices.FEW}": choices.KERNEL for name in fused.PROLOGUES}):
        agrees(recording_backend(compiled), Case(form, (3, 192), residual=mx.float32))
    if find_nvrtc() is None:
        pytest.skip("agrees, but NVRTC is not installed (pip's nvidia-cuda-nvrtc), so nothing was compiled")
    assert compiled["ring_fused_qmv"]


def test_what_is_not_supported_is_refused():
    case = Case(FOUR, (8, 96), residual=mx.float32)
    x, weight, eps, both, dtype = case.normed
    assert takes(fused_norm_qmv, x, weight, 1e-6, both, dtype)
    assert takes(fused_gate_qmv, x, case.gate, weight, 3, 1e-6, case.one, case.residual)
    assert takes(fused_add_qmv, x, case.one, case.residual)
    assert not takes(fused_norm_qmv, x, weight[:8], 1e-6, both)
    assert not takes(fused_norm_qmv, x.astype(mx.int32), weight, 1e-6, both)
    assert not takes(fused_norm_qmv, x, weight, 1e-6, both, mx.int32)
    assert not takes(fused_norm_qmv, x[:0], weight, 1e-6, both)
    assert not takes(fused_norm_qmv, mx.zeros((9, 96)), weight, 1e-6, both)
    assert not takes(fused_norm_qmv, x[:, :64], weight[:64], 1e-6, both)
    assert not takes(fused_gate_qmv, x, case.gate, weight, 5, 1e-6, case.one)
    assert not takes(fused_gate_qmv, x, case.gate[:1], weight, 3, 1e-6, case.one)
    assert not takes(fused_gate_qmv, x, case.gate, weight, 3, 1e-6, both)
    assert not takes(fused_add_qmv, x, both, case.residual)
    assert not takes(fused_add_qmv, x, case.one, case.residual[:, :5])
    assert not Matrices(case.one.first, packed((21, 96), EIGHT, 0)).supported
    assert not Matrices(case.one.first, packed((21, 64), FOUR, 0)).supported
    assert not Matrices(packed((2, 21, 96), FOUR, 0)).supported
    assert not Matrices(Packed(mx.zeros((9, 40)))).supported
    wide = Matrices(Packed(mx.zeros((9, 8192))))
    assert takes(fused_add_qmv, mx.zeros((1, 8192), mx.bfloat16), wide)
    assert not takes(fused_add_qmv, mx.zeros((1, 8192)), wide)
    with pytest.raises(ValueError, match=r"\[norm_qmv\] no kernel for x \(9, 96\)"):
        fused_norm_qmv(mx.zeros((9, 96)), weight, eps, both)
    with pytest.raises(ValueError, match=r"\[gate_qmv\] no kernel for x \(8, 96\)"):
        fused_gate_qmv(x, case.gate, weight, 5, eps, case.one)
    with pytest.raises(ValueError, match=r"\[add_qmv\] no kernel for x \(9, 96\)"):
        fused_add_qmv(mx.zeros((9, 96)), case.one)


def test_the_cases_are_not_trivial():
    first, second, gated, added = (to_numpy(y) for y in Case(FOUR).naive())
    assert all(0.05 < np.std(y) < 20 for y in (first, second, gated, added))
    assert np.std(first[:, : gated.shape[1]] - gated) > 0.05


def test_each_backend_fuses_as_many_tokens_as_pay():
    def constructor(*, output_names, **_):
        return lambda *, output_shapes, output_dtypes, **_: [
            mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]

    for name, most in {"metal": 8, "cuda": 8, "simulator": 8}.items():
        with launch.use(launch.Backend(name, constructor)):
            for tokens in (1, most, most + 1):
                case = Case(("affine", 4, 32), (tokens, 96))
                found = dispatch.norm_qmv(*case.normed), dispatch.gate_qmv(*case.gated), dispatch.add_qmv(*case.added)
                assert [f is not None for f in found] == [tokens <= most] * 3
