"""Mixture of experts for a few tokens: every format against float64, in check mode and with planted faults."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from metal_kernels.launch import Kernel
from metal_kernels.packed import Packed, bundle
from metal_kernels.quantized_moe import decode
from metal_kernels.quantized_moe.decode import check_decode, decode_moe
from metal_kernels.quantized_moe.decode import routed_moe as fused_routed_moe
from metal_kernels.quantized_moe.experts import Experts, naive_routed_moe, plain_moe
from metal_kernels.quantized_moe.prefill import prefill_moe
from tests.compare import assert_close, to_numpy
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact
from tests.metal_sim import SimulatedKernel, metal_kernel
from tests.moe_cases import AFFINE, EVERY_FORMAT, MICRO, PLAIN, Case, naive_moe, packed

CHECKED = backends()
FAST = backends("fast")


def run(case):
    return decode_moe(case.x, case.chosen, case.weights, Experts(*case.routed, case.shared), case.residual)


def naive(case):
    return naive_moe(case.x, case.chosen, case.weights, *case.routed, case.shared, case.residual)


@pytest.mark.parametrize("form", [*AFFINE[::4], *MICRO, *PLAIN])
@pytest.mark.parametrize("tokens", [2, 40])
def test_the_plain_form_that_leaves_stacks_packed_is_the_definition(form, tokens):
    case = Case(form, tokens, hidden=128, inner=128, shared=128, residual=mx.float32)
    found = plain_moe(case.x, case.chosen, case.weights, Experts(*case.routed, case.shared), case.residual)
    assert_close(found, naive(case), 1e-5)


def check(backend, case):
    with launch.use(backend):
        y = run(case)
    assert_as_exact(y, naive(case), case.exact())
    assert y.dtype == case.dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_packs_a_little_endian_bit_stream(bits):
    w = packed((3, 96), ("affine", bits, 32), 0, mx.float32)
    parts = [np.array(a) for a in (w.weight, w.dequantize(), w.scales, w.biases)]
    for words, row, scales, biases in zip(*parts, strict=True):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(words))
        codes = np.array([stream >> (bits * i) & (2**bits - 1) for i in range(96)])
        np.testing.assert_allclose(row, codes * scales.repeat(32) + biases.repeat(32), atol=1e-6)


@pytest.mark.parametrize("form", [("affine", 4, 32), *MICRO, *PLAIN])
@pytest.mark.parametrize("shared", [None, 40])
def test_the_naive_form_is_the_definition(form, shared):
    case = Case(form, 7, shared=None if shared is None else 32, residual=mx.float32, dtype=mx.float32)
    assert_close(naive(case), case.exact(), 1e-6)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", EVERY_FORMAT, ids=str)
def test_every_format(backend, form):
    group = form[2] or 32
    check(backend, Case(form, 2, hidden=96 if group == 32 else 3 * group, inner=group, shared=group))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [("affine", 4, 32), ("affine", 8, 32), ("mxfp4", 4, 32), ("plain", 16, 0)], ids=str)
def test_activations_and_scales_of_every_dtype(backend, dtype, form):
    check(backend, Case(form, 3, dtype=dtype, shared=64, residual=dtype))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_one_to_eight_tokens(backend, tokens):
    check(backend, Case(("affine", 4, 32), tokens, shared=64, residual=mx.bfloat16))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    ("residual", "shared"),
    [(None, 64), (mx.float32, 64), (mx.bfloat16, 64), (mx.float16, None), (None, None), (None, 32), (mx.bfloat16, 32)],
)
def test_residual_and_shared_expert(backend, residual, shared):
    case = Case(("affine", 4, 32), 2, shared=shared, residual=residual)
    assert Experts(*case.routed, case.shared).rides == (shared == 64)
    check(backend, case)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("shared", [64, 32, None])
def test_leading_axes_are_kept(backend, shared):
    case = Case(("affine", 4, 32), 6, shared=shared, residual=mx.bfloat16)
    x, chosen, weights, residual = (a.reshape(2, 3, -1) for a in (case.x, case.chosen, case.weights, case.residual))
    experts = Experts(*case.routed, case.shared)
    flat = naive(case).reshape(2, 3, -1)
    assert mx.array_equal(naive_moe(x, chosen, weights, *case.routed, case.shared, residual), flat)
    with launch.use(backend):
        for form in (decode_moe, prefill_moe):
            y = form(x, chosen, weights, experts, residual)
            assert y.shape == x.shape
            assert_close(y, flat, 2e-2, mx.bfloat16)


@pytest.mark.parametrize("backend", CHECKED)
def test_a_shared_expert_of_another_format_is_added(backend):
    case, other = (Case(("affine", b, 32), 2, shared=64, residual=mx.float32) for b in (4, 8))
    case.shared = other.shared
    assert not Experts(*case.routed, case.shared).rides
    check(backend, case)


@pytest.mark.parametrize("backend", CHECKED)
def test_down_may_have_another_format(backend):
    check(backend, Case(("affine", 4, 32), 2, shared=64, down_form=("affine", 6, 64), residual=mx.float32))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("sizes", [(32, 288), (160, 96), (1056, 32), (96, 1056)])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_do_not_fill_the_lanes(backend, sizes, bits):
    hidden, inner = sizes
    check(backend, Case(("affine", bits, 32), 1, hidden=hidden, inner=inner, shared=inner, experts=3, top_k=2))


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("top_k", [1, 15, 16, 17, 23])
def test_any_number_of_slots(backend, top_k):
    check(backend, Case(("affine", 4, 32), 1, experts=23, top_k=top_k, hidden=64, inner=32, shared=32))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_shapes_of_mini(backend, bits):
    check(backend, Case(("affine", bits, 64), 1, experts=3, top_k=2, hidden=2048, inner=512, shared=512))


@pytest.mark.parametrize("backend", FAST)
def test_eight_tokens_of_eight_experts(backend):
    case = Case(("affine", 4, 64), 8, experts=20, top_k=8, hidden=512, inner=256, shared=256, residual=mx.bfloat16)
    check(backend, case)


@pytest.mark.parametrize("backend", FAST)
def test_large_gates_saturate(backend):
    case = Case(("affine", 8, 32), 2, shared=64, dtype=mx.float32)
    case.x = case.x * 500
    check(backend, case)


@pytest.mark.parametrize("backend", FAST)
def test_runs_are_bit_equal(backend):
    case = Case(("affine", 4, 64), 3, experts=9, top_k=8, hidden=256, inner=128, shared=128)
    with launch.use(backend):
        first, second = run(case), run(case)
    assert mx.array_equal(first, second)


def bundled(experts):
    """The same experts as parts of one buffer."""
    buffer, parts = bundle(experts.leaves)
    left = iter(parts)
    return replace(experts.map(lambda _: next(left)), buffer=buffer)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", [("affine", 4, 32), ("mxfp8", 8, 32), PLAIN[0]], ids=str)
@pytest.mark.parametrize("shared", [None, 64, 32])  # none, one that rides, one that does not
def test_arrays_of_one_buffer(backend, form, shared):
    case = Case(form, 3, shared=shared, residual=mx.float32)
    apart = Experts(*case.routed, case.shared)
    seen = []
    call = Kernel.__call__

    def record(kernel, inputs, **how):
        seen.append(len(set(map(id, inputs))))
        return call(kernel, inputs, **how)

    with launch.use(backend), mock.patch.object(Kernel, "__call__", record):
        one = decode_moe(case.x, case.chosen, case.weights, bundled(apart), case.residual)
        assert seen == [3, 5]  # x, chosen, buffer; h, chosen, weights, buffer, residual
        other = decode_moe(case.x, case.chosen, case.weights, apart, case.residual)
    assert mx.array_equal(one, other)


def test_what_a_bundle_is():
    arrays = [mx.arange(100, dtype=mx.uint32).reshape(4, 25), mx.arange(6).astype(mx.bfloat16), mx.ones((8,), mx.uint8)]
    buffer, parts = bundle(arrays)
    assert buffer.shape == (2 * 64 + 64 + 2,)
    for a, b in zip(arrays, parts, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert mx.array_equal(a, b)
    assert bundle([*arrays, mx.ones((3,), mx.uint8)]) is None


def test_what_the_kernels_take():
    case = Case(("affine", 4, 32), 8)
    gate, up, down = case.routed
    experts = Experts(gate, up, down)
    assert takes(check_decode, case.x, experts)
    assert not takes(check_decode, mx.zeros((9, 96)), experts)
    assert not takes(check_decode, case.x.astype(mx.int32), experts)
    assert not Experts(gate, Packed(up.dequantize()), down).supported
    for mode, group in (("nvfp4", 16), ("mxfp4", 32)):
        q, s = mx.quantize(mx.ones((5, 64, 96)), group_size=group, bits=4, mode=mode)
        w = Packed(q, s, None, 4, group, mode)
        assert Experts(w, w, down).supported == (mode == "mxfp4")
    odd = [Packed(mx.zeros(shape)) for shape in ((3, 16, 40), (3, 16, 40), (3, 40, 16))]
    assert not Experts(*odd).supported


def test_shapes_that_disagree_are_named():
    case = Case(("affine", 4, 32), 2)
    with pytest.raises(ValueError, match="up and down disagree"):
        Experts(case.routed[0], case.routed[2], case.routed[1])
    experts = Experts(*case.routed)
    for x, chosen, weights, message in (
        (case.x[:, :64], case.chosen, case.weights, r"x and residual must be \[..., 96\]"),
        (case.x, case.chosen[:1], case.weights, r"must be \[2\] \+ \[k\]"),
        (case.x, case.chosen.astype(mx.uint32), case.weights, "chosen must be int32"),
    ):
        with pytest.raises(ValueError, match=message):
            experts.check(x, chosen, weights, None)


FAULTS = [
    (decode.GATE_UP, f"{BARRIER}\n    float gate", "float gate"),
    (decode.DOWN, BARRIER, ""),
    (decode.GATE_UP, "r * apart, last)", "r * apart, last + 1)"),
    (decode.GATE_UP, "i < STEPS; i++", "i < STEPS - 1; i++"),
    (decode.GATE_UP, "i < HELD; i++", "i < HELD - 1; i++"),
    (decode.GATE_UP, "places[t] < 0", "places[t] <= 0"),
    (decode.GATE_UP, "j < count", "j < count - 1"),
    (decode.GATE_UP, "uint t = token; t < TOKENS", "uint t = token; t < TOKENS - 1"),
    (decode.DOWN, "uint(N - 1)", "uint(N)"),
    (decode.DOWN, "start < BLOCKS;", "start < BLOCKS - LANES;"),
    (decode.DOWN, "t < pair / TOP_K && places[t] >= 0", "t < pair / TOP_K && places[t] > 0"),
    (decode.DOWN, "TOKENS > 1 && places[t] < 0", "TOKENS > 1 && places[t] <= 0"),
    (decode.GATE_UP, "row < N", "row <= N"),
    (decode.GATE_UP, "lane % LANES < BLOCKS", "lane % LANES <= BLOCKS"),
    (decode.GATE_UP, "lane % LANES, BLOCKS - 1", "lane % LANES, BLOCKS"),
    (decode.GATE_UP, "THREADS) {\n      packs", "THREADS) {\n      if (i > 0) packs"),
    (decode.GATE_UP, "slot == TOP_K", "slot == TOP_K - 1"),
    (decode.GATE_UP, "i < NW / 4", "i < NW / 4 - 1"),
    (decode.GATE_UP, "i < STEP;", "i < STEP - 1;"),
    (decode.GATE_UP, "(ROWS * PER_ROW + EACH - 1) / EACH", "(ROWS * PER_ROW - 1) / EACH"),
    (decode.DOWN, "simdgroup_barrier(mem_flags::mem_threadgroup);\n      }", "}"),
    (decode.DOWN, "row < N", "row <= N"),
    (decode.DOWN, "i < EACH;", "i < EACH - 1;"),
    (decode.DOWN, "j < SIMDGROUPS", "j <= SIMDGROUPS"),
    (decode.DOWN, "pair < PAIRS", "pair + 1 < PAIRS"),
    (decode.DOWN, "i < STEP / 4", "i < STEP / 4 - 1"),
]


@pytest.mark.parametrize(("kernel", "old", "new"), FAULTS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_a_planted_fault_is_caught(kernel, old, new):
    case = Case(("affine", 4, 32), 2, experts=3, hidden=160, inner=96, shared=96, dtype=mx.float32)
    with mutated(kernel, (old, new)):
        assert is_caught(lambda: [run(case)], [naive(case)])


IDLE_LANES = {"experts": 3, "hidden": 32, "inner": 544, "shared": 544}  # 17 blocks of a row for 8 lanes
MANY_SLOTS = {"experts": 14, "top_k": 13, "hidden": 64, "inner": 64}  # two for some simdgroups


@pytest.mark.parametrize(
    ("kernel", "old", "new", "sizes"),
    [
        (decode.GATE_UP, "K / STEP - first)", "K / STEP + first)", IDLE_LANES),
        (decode.DOWN, "lane % LANES < lanes", "lane % LANES <= lanes", IDLE_LANES),
        (decode.DOWN, "simdgroup_barrier(mem_flags::mem_threadgroup);\n        share", "share", MANY_SLOTS),
    ],
    ids=["interleaved", "idle lanes", "scales of the next slot"],
)
def test_a_fault_is_caught_where_it_matters(kernel, old, new, sizes):
    case = Case(("affine", 4, 64 if sizes is MANY_SLOTS else 32), 1, dtype=mx.float32, **sizes)
    with mutated(kernel, (old, new)):
        assert is_caught(lambda: [run(case)], [naive(case)])


def test_x_of_the_next_token_waits_for_the_one_before():
    case = Case(("affine", 4, 32), 4, experts=3, hidden=160, inner=96, shared=96, dtype=mx.float32)
    with mutated(decode.GATE_UP, (BARRIER, ""), occurrence=1):
        assert is_caught(lambda: [run(case)], [naive(case)])


@pytest.mark.parametrize("backend", FAST)
def test_an_expert_that_several_tokens_chose_is_read_once(backend):
    """Counted in the simulator: of equal choices, each row of weights is asked for once."""
    if backend.name != "simulator":
        pytest.skip("only the simulator counts")
    case = Case(("affine", 4, 32), 5, experts=7, hidden=128, inner=64, shared=64, residual=mx.float32)
    case.chosen = mx.stack([mx.roll(case.chosen[0], t) for t in range(5)])
    asked = {}

    def counting(**made):
        kernel = metal_kernel(**made, mode="check", strict=False, count=True)

        def call(**launched):
            out = kernel(**launched)
            asked.update({t.name: (t.reads.nbytes, t.distinct_read) for t in SimulatedKernel.last.traffic})
            return out

        return call

    with launch.use(launch.Backend("simulator", counting)):
        assert_as_exact(run(case), naive(case), case.exact())
    weights = {name: counts for name, counts in asked.items() if name.endswith("_w")}
    assert set(weights) == {f"{shared}{m}_w" for m in ("gate", "up", "down") for shared in ("", "shared_")}
    assert all(read == distinct > 0 for read, distinct in weights.values()), weights


@pytest.mark.parametrize(
    ("group", "dtype", "simdgroups"), [(64, mx.bfloat16, 4), (32, mx.bfloat16, 2), (64, mx.float32, 0)]
)
def test_threadgroup_memory_limits_the_simdgroups_or_the_widths(group, dtype, simdgroups):
    w = [
        Packed(mx.zeros((*n, k // 8), mx.uint32), *2 * [mx.zeros((*n, k // group), mx.bfloat16)], 4, group, "affine")
        for n, k in (((2, 64), 8192), ((2, 64), 8192), ((2, 8192), 64))
    ]
    experts = Experts(*w)
    assert decode._simdgroups(experts, dtype, decode.decode_rows("metal", 1), 9, 1) == (simdgroups, 9)
    assert takes(check_decode, mx.zeros((1, 8192), dtype), experts) == (simdgroups > 0)


def test_the_cases_are_not_trivial():
    case = Case(("affine", 4, 32), 3, shared=64, residual=mx.float32)
    parts = [to_numpy(naive(case)), to_numpy(naive_moe(case.x, case.chosen, case.weights, *case.routed))]
    assert 0.05 < np.std(parts[1]) < 5
    assert np.std(parts[0] - parts[1]) > 0.05


def routed(form, *, groups=4, bias=True, **sizes):
    """Arguments of `routed_moe` for one token."""
    case = Case(form, 1, experts=12, **sizes)
    keys = mx.random.split(mx.random.key(7), 2)
    logits = mx.random.normal((1, 12), key=keys[0])
    options = (case.chosen.shape[-1], groups, max(1, groups // 2), 2.5, True)
    return (
        case.x,
        logits,
        mx.random.normal((12,), key=keys[1]) if bias else None,
        *options,
        Experts(*case.routed, case.shared),
        case.residual,
    )


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("form", [("affine", 4, 32), ("mxfp8", 8, 32), PLAIN[0]], ids=str)
@pytest.mark.parametrize(("groups", "bias", "shared"), [(4, True, 64), (1, False, None), (12, True, 64)])
def test_experts_that_are_chosen_within(backend, form, groups, bias, shared):
    args = routed(form, groups=groups, bias=bias, shared=shared, residual=mx.float32)
    right, chosen, weights = naive_routed_moe(*args)
    with launch.use(backend):
        y, found, its = fused_routed_moe(*args)
        apart = decode_moe(args[0], chosen, its, *args[-2:])
    assert mx.array_equal(found, chosen)
    assert found.dtype == mx.int32
    assert_close(its, weights, 1e-6)
    assert mx.array_equal(y, apart)
    assert_close(y, right, 2e-2)


@pytest.mark.parametrize("backend", FAST)
def test_chosen_within_at_the_shapes_of_mini(backend):
    case = Case(("affine", 4, 64), 1, experts=4, top_k=4, hidden=2048, inner=512, shared=512)
    logits = mx.random.normal((1, 4), key=mx.random.key(1))
    args = case.x, mx.concatenate([logits, mx.full((1, 252), -9.0)], axis=-1), None, 4, 8, 4, 2.5, True
    with launch.use(backend):
        y, chosen, weights = fused_routed_moe(*args, Experts(*case.routed, case.shared), None)
        expected = decode_moe(case.x, chosen, weights, Experts(*case.routed, case.shared), None)
    assert mx.array_equal(chosen, naive_routed_moe(*args, Experts(*case.routed, case.shared), None)[1])
    assert mx.array_equal(y, expected)


# The second is for tokens after the first; those within the choice are the router's.
@pytest.mark.parametrize("n", [n for n in barriers(decode.ROUTED_GATE_UP) if n != 1])
def test_a_missing_barrier_of_the_choice_is_caught(n):
    args = routed(("affine", 4, 32), shared=64)
    with mutated(decode.ROUTED_GATE_UP, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_routed_moe(*args), naive_routed_moe(*args))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("picked[slot]", "picked[0]"),
        ("lane < TOP_K)", "lane <= TOP_K)"),
        ("slot == 0 && first == 0", "slot == 1 && first == 1"),
        ("if (!is_shared) {", "if (false) {"),
    ],
)
def test_a_fault_in_the_choice_is_caught(old, new):
    args = routed(("affine", 4, 32), shared=64)
    right = naive_routed_moe(*args)
    with mutated(decode.ROUTED_GATE_UP, (old, new)):
        assert is_caught(lambda: fused_routed_moe(*args), right)


def test_what_is_chosen_apart():
    args = routed(("affine", 4, 32))
    x, logits, *rest = args
    assert takes(fused_routed_moe, *args)
    assert not takes(fused_routed_moe, mx.concatenate([x, x]), mx.concatenate([logits, logits]), *rest)
    assert not takes(fused_routed_moe, x, logits.astype(mx.bfloat16), *rest)
    assert not takes(fused_routed_moe, *routed(("affine", 4, 32), shared=32))
