"""The decode kernel of lightning attention: against float64, bounds and races checked, faults caught."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_kernels import choices, launch
from metal_kernels.lightning_attn import fused_recurrent
from metal_kernels.lightning_attn.fused_recurrent import fused_qkv_lightning_attn
from metal_kernels.lightning_attn.naive import naive_qkv_lightning_attn
from metal_kernels.recorded import find
from ring_mlx.model.attention import first_of
from tests import kernel_reference as reference
from tests.compare import assert_close
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated, takes
from tests.kernel_reference import DTYPES, assert_as_exact, rope_frequencies

RATES = [0.7, 0.03, 1e-5, 0.2, 2.0]


def arguments(
    B=2,
    T=3,
    H=3,
    D=64,
    R=32,
    dtype=mx.bfloat16,
    weight_dtype=mx.float32,
    norm=True,
    offset=5,
    rates=None,
    has_state=True,
    mask=None,
):
    keys = mx.random.split(mx.random.key(D + T), 4)
    qkv = mx.random.normal((B, T, 3 * H * D), key=keys[0]).astype(dtype)
    weights = [mx.random.uniform(0.5, 2, (D,), key=key).astype(weight_dtype) if norm else None for key in keys[1:3]]
    state = mx.random.normal((B, H, D, D), key=keys[3]) if has_state else None
    decay_rate = mx.array((rates or RATES * 7)[:H])
    return qkv, *weights, rope_frequencies(R), 1.25, offset, decay_rate, D**-0.5, 1e-6, state, mask


def check(backend, args):
    with launch.use(backend):
        actual = fused_qkv_lightning_attn(*args)
    exact = reference.qkv_lightning_attn(*args)
    for a, n, e in zip(actual, naive_qkv_lightning_attn(*args), exact, strict=True):
        assert_as_exact(a, n, e)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "R"), [(32, 8), (32, 32), (64, 32), (96, 48), (128, 64)])
def test_heads_of_every_size(backend, dtype, D, R):
    check(backend, arguments(D=D, R=R, dtype=dtype))


@pytest.mark.parametrize("backend", backends())
def test_the_largest_head_and_the_most_tokens(backend):
    check(backend, arguments(B=1, T=8, H=1, D=256, R=128))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("T", range(1, 9))
def test_every_number_of_tokens(backend, T):
    check(backend, arguments(B=1, T=T, H=1, D=32, R=16))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("columns", [16, 32])
def test_both_widths_of_a_slice(backend, columns, monkeypatch):
    monkeypatch.setattr(fused_recurrent, "columns_of_a_slice", lambda B, H, D, enough: columns)
    check(backend, arguments())


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_every_dtype(backend, weight_dtype):
    check(backend, arguments(D=32, R=16, weight_dtype=weight_dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
def test_without_norms_and_without_a_state(backend, norm, has_state):
    check(backend, arguments(D=32, R=16, norm=norm, has_state=has_state))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("offset", [0, 131071, mx.array([7, 100000])])
def test_positions(backend, offset):
    check(backend, arguments(D=32, R=16, dtype=mx.float32, offset=offset))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("rate", [0.0, 1e-6, 5.0, 90.0, 1e4])
def test_extreme_decays(backend, rate):
    check(backend, arguments(D=32, R=16, dtype=mx.float32, rates=[rate, 0.5, rate]))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "mask", [[[False, True, True], [True, True, True]], [[True, False, False], [True, False, True]], [[False] * 3] * 2]
)
def test_rows_of_their_own_length(backend, mask):
    check(backend, arguments(D=32, R=16, mask=mx.array(mask)))


@pytest.mark.parametrize("backend", backends())
def test_a_masked_token_leaves_the_state_alone_whatever_it_holds(backend):
    args = list(arguments(D=32, R=16, mask=mx.zeros((2, 3), mx.bool_)))
    args[0] = mx.full(args[0].shape, mx.nan, mx.bfloat16)
    with launch.use(backend):
        _, state = fused_qkv_lightning_attn(*args)
    assert_close(state, args[9], 0)


@pytest.mark.parametrize("backend", backends())
def test_tokens_one_by_one_equal_all_at_once(backend):
    args = arguments(B=1, T=4, D=32, R=16, dtype=mx.float32)
    with launch.use(backend):
        whole, state = fused_qkv_lightning_attn(*args)
        parts, S = [], args[9]
        for t in range(4):
            o, S = fused_qkv_lightning_attn(args[0][:, t : t + 1], *args[1:5], 5 + t, *args[6:9], S)
            parts.append(o)
    assert_close(mx.concatenate(parts, axis=1), whole, 1e-6)
    assert_close(S, state, 1e-6)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("mask", [None, mx.array([[True, True, False, True, True], [False, True, True, True, False]])])
def test_the_state_after_each_token(backend, mask):
    args = *arguments(T=5, D=32, R=16, dtype=mx.float32, mask=mask), True
    check(backend, args)
    with launch.use(backend):
        (o, each), (whole, last) = fused_qkv_lightning_attn(*args), fused_qkv_lightning_attn(*args[:-1])
    assert each.shape == (5, 2, 3, 32, 32)
    assert mx.array_equal(each[-1], last)
    assert mx.array_equal(o, whole)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize(("T", "D"), [(2, 32), (3, 64), (4, 96), (5, 128), (6, 256), (7, 32), (8, 64)])
def test_every_number_of_a_step_s_tokens_may_be_kept_of_each_row(backend, T, D):
    """States and outputs are those of the naive recurrence of each row over the tokens that it keeps."""
    offsets = [0, 7, 1000]
    for n in range(T + 1):
        kept = (n, T - n, n // 2)
        args = arguments(B=3, T=T, H=2, D=D, dtype=mx.float32, offset=mx.array(offsets), mask=first_of(kept, T))
        with launch.use(backend):
            o, state = fused_qkv_lightning_attn(*args)
        qkv, *weights, _, decay_rate, scale, eps, before, _ = args
        for b, count in enumerate(kept):
            row = qkv[b : b + 1, :count], *weights, offsets[b], decay_rate, scale, eps, before[b : b + 1], None
            expected = naive_qkv_lightning_attn(*row) if count else (o[b : b + 1, :0], before[b : b + 1])
            assert_close(state[b : b + 1], expected[1], 1e-6)
            if count:
                assert_close(o[b : b + 1, :count], expected[0], 1e-6)


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 16), (2, 1, 16), (1, 8, 16), (3, 1, 20)])
def test_the_shapes_of_mini(backend, B, T, H):
    check(backend, arguments(B=B, T=T, H=H, D=128, R=64, weight_dtype=mx.bfloat16))


@pytest.mark.parametrize("B", [1, 2, 8])
@pytest.mark.parametrize(("enough", "least"), [(1, 64), (128, 128)])
def test_there_are_threadgroups_for_every_core(B, enough, least, monkeypatch):
    monkeypatch.setattr(fused_recurrent, "ENOUGH_THREADGROUPS", {"metal": enough})
    monkeypatch.setattr(choices, "NOTHING", choices.Held({}))
    qkv, *_, decay_rate, _, _, _, _ = arguments(B=B, T=1, H=16, D=128, has_state=False)
    given = qkv, None, None, rope_frequencies(64), 1.0, 0, decay_rate, 1.0, 0.0
    ((_, _, how),) = find(fused_qkv_lightning_attn, given)[0].launches
    assert how["grid"][0] // how["threadgroup"][0] >= least


@pytest.mark.parametrize("n", barriers(fused_recurrent.KERNEL))
def test_a_missing_barrier_is_caught(n):
    args = arguments(B=1, D=32, R=16, dtype=mx.float32)
    with mutated(fused_recurrent.KERNEL, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: fused_qkv_lightning_attn(*args), naive_qkv_lightning_attn(*args))


@pytest.mark.parametrize(
    "change",
    [
        ("n < N * COLUMNS", "n <= N * COLUMNS"),
        ("n < 2 * N; n", "n <= 2 * N; n"),
        ("n < 2 * N; n", "n < 2 * N - 1; n"),
        ("i < STEPS; i++) S[i] = S[i] * decay", "i < STEPS - 1; i++) S[i] = S[i] * decay"),
        ("lane < LANES", "lane <= LANES"),
        ("is_rotated = d < R;", "is_rotated = d <= R;"),
        ("far < 32", "far < 16"),
        ("i < SIMDGROUPS; i++) sum", "i < SIMDGROUPS - 1; i++) sum"),
        ("t * states", "(t + 1) * states"),
        ("* (D * D);", "* D;"),
    ],
)
def test_a_bound_off_by_one_is_caught(change):
    args = *arguments(B=1, D=64, R=32, dtype=mx.float32), True
    with mutated(fused_recurrent.KERNEL, change):
        assert is_caught(lambda: fused_qkv_lightning_attn(*args), naive_qkv_lightning_attn(*args))


def test_what_is_not_supported_is_refused():
    qkv, q_weight, k_weight, inv_freq, _, _, decay_rate, *_ = arguments()
    assert takes(fused_qkv_lightning_attn, qkv, q_weight, k_weight, inv_freq, 1.0, 0, decay_rate, 1.0, 1e-6)
    assert not takes(fused_qkv_lightning_attn, qkv, q_weight, None, inv_freq, 1.0, 0, decay_rate, 1.0, 1e-6)
    assert not takes(
        fused_qkv_lightning_attn, arguments(T=9)[0], q_weight, k_weight, inv_freq, 1.0, 0, decay_rate, 1.0, 1e-6
    )
    assert not takes(fused_qkv_lightning_attn, arguments(D=288)[0], None, None, inv_freq, 1.0, 0, decay_rate, 1.0, 1e-6)
    assert not takes(fused_qkv_lightning_attn, arguments(D=48)[0], None, None, inv_freq, 1.0, 0, decay_rate, 1.0, 1e-6)
    assert not takes(
        fused_qkv_lightning_attn, qkv, q_weight, k_weight, rope_frequencies(128), 1.0, 0, decay_rate, 1.0, 1e-6
    )
    with pytest.raises(ValueError, match=r"\[qkv_lightning_attn\] no kernel for qkv \(2, 9, 576\)"):
        fused_qkv_lightning_attn(*arguments(T=9))
    with pytest.raises(ValueError, match=r"no kernel for qkv"):
        fused_qkv_lightning_attn(*arguments(offset=mx.array([1, 2, 3])))
    bad = list(arguments())
    bad[9] = bad[9].astype(mx.float16)
    with pytest.raises(ValueError, match="state must be"):
        fused_qkv_lightning_attn(*bad)
    with pytest.raises(ValueError, match="mask must be"):
        fused_qkv_lightning_attn(*arguments(mask=mx.ones((2, 4), mx.bool_)))
