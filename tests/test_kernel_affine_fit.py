"""The fit of affine scales: as good as a longer search, and its kernel equal to NumPy to the bit, faults caught."""

from __future__ import annotations

import functools
import warnings

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import affine_fit, launch
from metal_kernels.affine_fit import fused, naive
from metal_kernels.affine_fit.fused import fused_affine_fit
from metal_kernels.affine_fit.naive import Effort, naive_affine_fit
from ring_mlx.convert.fit import EFFORTS
from tests.compare import to_numpy
from tests.kernel_backends import backends, mutated, proving, simulator, takes
from tests.metal_sim import MetalRunError, metal_kernel
from tests.metal_sim.marks import needs_simulator
from tests.test_kernels_as_cuda import recording_backend

FAST, BEST = EFFORTS["fast"], EFFORTS["best"]
KINDS = [
    # bits, group, dtype of the weights, dtype of the scales, effort
    (4, 64, mx.bfloat16, mx.bfloat16, FAST),
    (3, 32, mx.float32, mx.float16, BEST),
    (8, 128, mx.float16, mx.bfloat16, FAST),
    (5, 32, mx.bfloat16, mx.float32, Effort(((0, 0), (3, 5)), 0)),
    (6, 64, mx.float32, mx.bfloat16, FAST),
    (2, 32, mx.bfloat16, mx.float16, FAST),
]


def weights(group=64, dtype=mx.bfloat16, seed=0):
    """Groups of every kind [14, 2 * group]: random ones of many sizes, and those that leave nothing to fit."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (14, 2 * group)) * 10.0 ** rng.uniform(-4, 2, (14, 1))
    w[1], w[2] = np.abs(w[1]), -np.abs(w[2]) - 3
    w[3], w[4, :group], w[4, group:] = 0, 0.375, -5
    w[5], w[6, 1:] = w[5] * 1e-20, 0
    w[7] = np.where(rng.random(2 * group) < 0.5, 1, -1)
    w[8] = 1000 + w[8] % 1
    return mx.array(w.astype(np.float32)).astype(dtype)


def same(found, expected):
    return [a.shape == b.shape and a.dtype == b.dtype and bool(mx.array_equal(a, b)) for a, b in zip(found, expected, strict=True)]  # fmt: skip


def errors(w, packed, bits, group):
    """The squared error of each group [N, K / group]."""
    words, scales, biases = packed
    back = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group, bits)
    return np.square(to_numpy(back) - to_numpy(w)).reshape(w.shape[0], -1, group).sum(-1)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("bits", "group", "w_dtype", "dtype", "effort"), KINDS)
def test_the_kernel_gives_the_bits_of_numpy(backend, bits, group, w_dtype, dtype, effort):
    arguments = weights(group, w_dtype, bits), bits, group, dtype, effort
    with launch.use(backend):
        found = fused_affine_fit(*arguments)
    assert all(same(found, naive_affine_fit(*arguments)))


@needs_simulator
def test_the_cuda_text_gives_the_bits_of_numpy():
    arguments = weights(32), 3, 32, mx.bfloat16, FAST
    with launch.use(recording_backend({})):
        assert all(same(fused_affine_fit(*arguments), naive_affine_fit(*arguments)))


@pytest.mark.parametrize(
    "change",
    [
        ("n <= STARTS + ROUNDS", "n < STARTS + ROUNDS"),
        ("n >= 1 && n <= STARTS", "n >= 1 && n < STARTS"),
        ("starts[2 * n - 1]", "starts[2 * n]"),
        ("if (e < least) {", "if (e > least) {"),
        ("- zero) * units.up), -float", "+ zero) * units.up), -float"),
        ("bool is_low = metal::abs(first) >", "bool is_low = metal::abs(first) <"),
        ("float(low) + float(across", "float(low) - float(across"),
        ("at + BITS > 32", "at + BITS > 33"),
        ("words[word] |= q", "words[word] = q"),
        ("line.inverse), 0, TOP", "line.inverse), 0, TOP + 1"),
        ("block < GROUP / 32", "block <= GROUP / 32"),
        ("to[block * BITS + i]", "to[block * BITS + i + 1]"),
        ("uint group = thread_position_in_grid.x", "uint group = thread_position_in_grid.x + 1"),
        ("2 * FRACTION * long(sum)", "FRACTION * long(sum)"),
        ("metal::rint(next_s * float(q_sum))", "next_s * float(q_sum)"),
    ],
)
def test_a_fault_in_the_kernel_is_caught(change):
    random = mx.random.normal((60, 64), key=mx.random.key(0))
    cases = [(weights(32), 3, 32, mx.bfloat16, FAST), (random, 3, 32, mx.float32, FAST)]
    with mutated(fused.KERNEL, change), simulator("check", strict=False):
        for arguments in cases:
            try:
                if not all(same(fused_affine_fit(*arguments), naive_affine_fit(*arguments))):
                    return
            except MetalRunError:
                return
    pytest.fail("nothing showed the fault")


@needs_simulator
def test_a_kernel_that_differs_in_one_bit_never_serves():
    arguments = weights(32), 3, 32, mx.bfloat16, FAST
    spoiled = ("inverse), 0, TOP", "inverse), 0, TOP - (line.start > 999.0f ? 1 : 0)")
    where = proving(functools.partial(metal_kernel, mode="fast", strict=False))
    with launch.use(where), mutated(fused.KERNEL, spoiled), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert all(same(affine_fit(*arguments), naive_affine_fit(*arguments)))
    assert [e["passed"] for e in where.ledger.entries()] == [False]
    assert len(told) == 1
    assert "of affine_fit differs in" in str(told[0].message)


@needs_simulator
def test_weights_that_are_no_numbers_are_held_against_no_kernel():
    where = proving(functools.partial(metal_kernel, mode="fast"))
    bad = mx.concatenate([weights(32)[:7], mx.full((1, 64), mx.nan, mx.bfloat16)])
    with launch.use(where):
        affine_fit(bad, 3, 32, mx.bfloat16, FAST)
        assert where.ledger.entries() == []
        affine_fit(weights(32)[:8], 3, 32, mx.bfloat16, FAST)
    assert [e["passed"] for e in where.ledger.entries()] == [True]


def test_the_bits_do_not_depend_on_blocks_and_processors(monkeypatch):
    arguments = weights(64), 4, 64, mx.bfloat16, FAST
    whole = naive_affine_fit(*arguments)
    monkeypatch.setattr(naive, "PART_WEIGHTS", 3 * 64)
    monkeypatch.setattr(naive.os, "cpu_count", lambda: 5)
    assert all(same(naive_affine_fit(*arguments), whole))


@pytest.mark.parametrize(("bits", "group", "w_dtype", "dtype", "effort"), KINDS)
def test_every_code_is_the_nearest_and_no_group_is_worse_than_mlxs(bits, group, w_dtype, dtype, effort):
    w = weights(group, w_dtype, bits)
    packed = naive_affine_fit(w, bits, group, dtype, effort)
    _, scales, biases = packed
    s, b = (to_numpy(a)[..., None] for a in (scales, biases))
    x = to_numpy(w).reshape(*scales.shape, group)
    q = np.clip(np.rint((x - b) / np.where(s == 0, 1, s)), 0, (1 << bits) - 1)
    nearest, found = np.square(x - (s * q + b)).sum(-1), errors(w, packed, bits, group)
    # Weights are rounded to 2^-16 of their group's range before their code is chosen, and float32 rounds what is read back.
    slack = group * np.square(2.0**-15 * np.ptp(x, axis=-1) + 2.0**-22 * np.abs(x).max(-1))
    assert (found <= nearest * (1 + 2e-3) + slack).all()
    rounded = mx.quantize(w.astype(dtype), group, bits)
    assert (found <= errors(w, rounded, bits, group) * (1 + 2e-3) + slack).all()


def long_search(w, bits, group):
    """The least squared error of each group in float64, from 17 ranges drawn in by factors, two rounds each."""
    x, top = to_numpy(w).reshape(-1, group), (1 << bits) - 1
    _, scales, biases = (to_numpy(a) for a in mx.quantize(w, group, bits))
    starts, low, high = [(scales.reshape(-1, 1), biases.reshape(-1, 1))], x.min(-1, keepdims=True), x.max(-1, keepdims=True)  # fmt: skip
    starts += [((q * high - p * low) / top, p * low) for p in (1, 0.92, 0.84, 0.76) for q in (1, 0.92, 0.84, 0.76)]
    least = np.full(len(x), np.inf)
    for s, b in starts:
        for _ in range(2):
            q = np.clip(np.rint((x - b) / s), 0, top)
            dx, dq = x - x.mean(-1, keepdims=True), q - q.mean(-1, keepdims=True)
            s = (dx * dq).mean(-1, keepdims=True) / np.square(dq).mean(-1, keepdims=True)
            b = x.mean(-1, keepdims=True) - s * q.mean(-1, keepdims=True)
            kept, at = (to_numpy(mx.array(v).astype(mx.bfloat16)) for v in (s, b))
            codes = np.clip(np.rint((x - at) / kept), 0, top)
            least = np.minimum(least, np.square(x - kept * codes - at).sum(-1))
    return least.sum()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_fast_keeps_91_percent_of_the_gain_of_a_long_search_and_best_gains_more(bits):
    w = (0.02 * mx.random.normal((64, 1024), key=mx.random.key(bits))).astype(mx.bfloat16)
    rounded = errors(w, mx.quantize(w, 64, bits), bits, 64).sum()
    gain = rounded - long_search(w, bits, 64)
    fast, best = (
        rounded - errors(w, naive_affine_fit(w, bits, 64, mx.bfloat16, e), bits, 64).sum() for e in (FAST, BEST)
    )
    assert fast > 0.91 * gain
    assert best > fast
    assert best > 0.98 * gain


def test_what_the_kernel_does_not_take():
    w = mx.zeros((3, 192), mx.bfloat16)
    assert takes(fused_affine_fit, w, 4, 64, mx.bfloat16, FAST)
    assert not takes(fused_affine_fit, w, 7, 64, mx.bfloat16, FAST)
    assert not takes(fused_affine_fit, w, 4, 96, mx.bfloat16, FAST)
    assert not takes(fused_affine_fit, w, 4, 128, mx.bfloat16, FAST)
    assert not takes(fused_affine_fit, w.astype(mx.int32), 4, 64, mx.bfloat16, FAST)
    assert not takes(fused_affine_fit, w, 4, 64, mx.int32, FAST)
    with pytest.raises(ValueError, match=r"\[affine_fit\] no kernel for \(3, 192\)"):
        fused_affine_fit(w, 7, 64, mx.bfloat16, FAST)
