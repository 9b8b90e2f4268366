"""Mixture of experts for many tokens: routing, tiles and formats against float64, in check mode and with planted faults."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.quantized_moe import prefill
from metal_kernels.quantized_moe.experts import Experts
from metal_kernels.quantized_moe.prefill import check_prefill, prefill_moe
from metal_kernels.quantized_moe.tiles import TILES, operand, prefill_tile
from tests.compare import assert_close, relative_rms, to_numpy
from tests.kernel_backends import BARRIER, backends, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.moe_cases import EVERY_FORMAT, Case, naive_moe

CHECKED = backends()
FAST = backends("fast")
SMALL, MIDDLE, LARGE = TILES


def run(case, tile=None, dtype=mx.float32):
    experts = Experts(*case.routed, case.shared)
    return prefill_moe(case.x, case.chosen, case.weights, experts, case.residual, tile, dtype)


def naive(case):
    """On the CPU: cuBLAS sums in blocks, more exactly than the definition's float32 does."""
    with mx.stream(mx.cpu):
        return naive_moe(case.x, case.chosen, case.weights, *case.routed, case.shared, case.residual)


def check(backend, case, tile=None):
    with launch.use(backend):
        y = run(case, tile)
    assert_as_exact(y, naive(case), case.exact())


def plain_form(case, dtype):
    """The same layer as plain operations in ``dtype`` give it: weights and products rounded to it, sums in float32."""

    def rounded(a):
        return a.astype(dtype).astype(mx.float32)

    def product(x, w):
        return rounded(mx.gather_mm(x[..., None, :], rounded(w.dequantize()).swapaxes(-1, -2), rhs_indices=chosen))[
            ..., 0, :
        ]

    chosen = case.chosen
    g, u = (product(rounded(case.x)[:, None], w) for w in case.routed[:2])
    parts = product(rounded(rounded(g * mx.sigmoid(g)) * u), case.routed[2])
    return (parts * case.weights[..., None]).sum(axis=1)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", EVERY_FORMAT, ids=str)
def test_every_format(backend, form):
    group = form[2] or 32
    case = Case(form, 5, top_k=2, hidden=96 if group == 32 else group, inner=group, shared=group)
    check(backend, case, SMALL)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("dtype", "multiplied"),
    [*((d, mx.float32) for d in DTYPES), *((d, d) for d in DTYPES[1:]), (mx.float32, mx.bfloat16)],
)
def test_activations_and_operands_of_every_dtype(backend, dtype, multiplied):
    case = Case(("affine", 4, 32), 6, dtype=dtype, inner=96)
    with launch.use(backend):
        y = run(case, SMALL, multiplied)
    form = naive(case) if multiplied == mx.float32 else plain_form(case, multiplied)
    assert_as_exact(y, form, case.exact())


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("multiplied", [mx.float32, mx.bfloat16])
def test_every_tile(backend, tile, multiplied):
    case = Case(("affine", 4, 32), 41, experts=3, top_k=2, shared=64, residual=mx.float32)
    with launch.use(backend):
        y = run(case, tile, multiplied)
    if multiplied == mx.float32:
        assert_as_exact(y, naive(case), case.exact())
    else:
        assert_close(y, case.exact(), 6e-3)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 200])
def test_lengths(backend, tokens):
    check(backend, Case(("affine", 4, 64), tokens, experts=11, top_k=4, hidden=192, inner=128, residual=mx.bfloat16))
    check(backend, Case(("affine", 8, 32), tokens, shared=64))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("residual", "shared"),
    [(None, 64), (mx.float32, 64), (mx.bfloat16, 64), (mx.float16, None), (None, None), (None, 32), (mx.bfloat16, 32)],
)
def test_residual_and_shared_expert(backend, residual, shared):
    case = Case(("affine", 4, 32), 5, shared=shared, residual=residual)
    assert Experts(*case.routed, case.shared).rides == (shared == 64)
    check(backend, case, SMALL)


@pytest.mark.parametrize("backend", CHECKED)
def test_down_may_have_another_format(backend):
    case = Case(("affine", 4, 32), 5, shared=64, down_form=("affine", 6, 64), residual=mx.float32)
    check(backend, case, SMALL)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("tile", TILES)
def test_one_expert_takes_all_and_others_none(backend, tile):
    case = Case(("affine", 4, 32), 37, experts=7, top_k=1)
    for expert in (0, 4, 6):
        case.chosen = mx.full((37, 1), expert, mx.int32)
        check(backend, case, tile)


@pytest.mark.parametrize("backend", FAST)
def test_tokens_keep_their_own_weights(backend):
    case = Case(("affine", 4, 32), 64, experts=6, top_k=6, shared=64)
    case.weights = mx.exp(mx.random.normal((64, 6), key=mx.random.key(5)) * 3)
    check(backend, case)


@pytest.mark.parametrize("backend", FAST)
def test_runs_are_bit_equal_and_tokens_independent(backend):
    case = Case(("affine", 4, 64), 70, experts=9, top_k=3, hidden=128, inner=64, shared=64)
    with launch.use(backend):
        first, second = run(case, LARGE), run(case, LARGE)
        case.x, case.chosen, case.weights = case.x[33:], case.chosen[33:], case.weights[33:]
        last = run(case, LARGE)
    assert mx.array_equal(first, second)
    assert mx.array_equal(first[33:], last)


@pytest.mark.parametrize("backend", FAST)
def test_the_shapes_of_mini(backend):
    case = Case(("affine", 4, 64), 12, experts=3, top_k=2, hidden=2048, inner=512)
    check(backend, case)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("experts", [1, 5, 31, 32, 33, 70])
@pytest.mark.parametrize("shared", [False, True])
def test_the_plan_covers_every_pair_once(backend, experts, shared):
    tokens, top_k, rows = 50, min(experts, 3), 16
    chosen = mx.argsort(mx.random.uniform(shape=(tokens, experts)) ** 3, axis=-1)[:, :top_k].astype(mx.int32)
    order = mx.argsort(chosen.reshape(-1))
    total = tokens * top_k
    bound = total // rows + min(experts, total) + -(-tokens // rows) * shared
    with launch.use(backend):
        (tiles,) = prefill.PLAN(
            [chosen, order],
            template=[("E", experts), ("TOP_K", top_k), ("BM", rows), ("SHARED", shared)],
            grid=(256, 1, 1),
            threadgroup=(256, 1, 1),
            shapes=[(bound, 4)],
            dtypes=[mx.int32],
        )
    sorted_experts = np.array(chosen).ravel()[np.array(order)]
    covered = []
    for expert, first, last, _ in np.array(tiles):
        assert 0 <= last - first <= rows
        covered += range(first, last)
        assert all(sorted_experts[p] == expert if p < total else expert == experts for p in range(first, last))
    assert covered == list(range(total + tokens * shared))


def test_tiles_follow_the_rows_of_an_expert():
    assert [prefill_tile(rows, 100) for rows in (1, 11, 16, 39, 64, 500)] == [
        SMALL,
        SMALL,
        MIDDLE,
        MIDDLE,
        LARGE,
        LARGE,
    ]
    assert operand("metal", mx.bfloat16) == operand("simulator", mx.bfloat16) == mx.float32
    assert operand("cuda", mx.bfloat16) == mx.bfloat16


@pytest.mark.parametrize("backend", FAST)
def test_the_backends_own_choices(backend):
    case = Case(("affine", 4, 32), 20, shared=64, dtype=mx.float16, residual=mx.float16)
    experts = Experts(*case.routed, case.shared)
    assert takes(check_prefill, case.x, experts)
    assert not takes(check_prefill, case.x[:0], experts)
    with launch.use(backend):
        y = prefill_moe(case.x, case.chosen, case.weights, experts, case.residual)
    assert y.dtype == mx.float16
    assert relative_rms(y, case.exact()) < 2e-3


FAULTS = [
    *((prefill.PLAN, BARRIER, "", i) for i in range(2)),
    (prefill.PLAN, "e <= E;", "e < E;", 0),
    (prefill.PLAN, "low = middle + 1", "low = middle + 2", 0),
    (prefill.PLAN, "tile_starts[middle + 1] <= i", "tile_starts[middle + 1] < i", 0),
    (prefill.PLAN, "i < bound", "i < bound - 1", 0),
    *((prefill.GATE_UP, BARRIER, "", i) for i in range(4)),
    (prefill.GATE_UP, "first + row < last", "first + row <= last", 0),
    *((prefill.GATE_UP, "at < K", "at <= K", i) for i in range(2)),
    (prefill.GATE_UP, "k < K + BK", "k < K", 0),
    (prefill.GATE_UP, ", last - 1)", ", last)", 0),
    *((prefill.DOWN, BARRIER, "", i) for i in range(4)),
    (prefill.DOWN, "column + n < N", "column + n <= N", 0),
    (prefill.DOWN, "p < last", "p <= last", 0),
    (prefill.DOWN, "uint(N - 1)", "uint(N)", 0),
    (prefill.COMBINE, "j < SLOTS", "j + 1 < SLOTS", 0),
    (prefill.COMBINE, "n = thread_position_in_grid.x * 4", "n = thread_position_in_grid.x * 4 + 4", 0),
]


@pytest.mark.parametrize(
    ("kernel", "old", "new", "occurrence"), FAULTS, ids=lambda v: v.name if hasattr(v, "name") else str(v)
)
def test_a_planted_fault_is_caught(kernel, old, new, occurrence):
    # 17 rows of the last expert, with none of the shared one behind them. Only 16-bit operands have slices past K.
    case = Case(("affine", 4, 32), 17, experts=2, top_k=2, hidden=96, inner=96, dtype=mx.float32)
    multiplied = mx.bfloat16 if "at <" in old else mx.float32
    with mutated(kernel, (old, new), occurrence=occurrence):
        assert is_caught(lambda: [run(case, SMALL, multiplied)], [naive(case)])


def test_the_cases_are_not_trivial():
    case = Case(("affine", 4, 32), 9)
    assert len(set(np.array(case.chosen).ravel())) > 3
    assert np.std(to_numpy(naive(case))) > 0.05
