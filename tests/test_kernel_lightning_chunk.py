"""The prefill kernels of lightning attention: against float64, bounds and races checked, faults caught."""

from __future__ import annotations

import mlx.core as mx
import pytest

from metal_kernels import choices, launch
from metal_kernels.lightning_attn import simd_chunk
from metal_kernels.lightning_attn.naive import naive_lightning_attn
from metal_kernels.lightning_attn.simd_chunk import simd_chunk_lightning_attn
from metal_kernels.recorded import find
from tests import kernel_reference as reference
from tests.compare import assert_close
from tests.kernel_backends import BARRIER, backends, barriers, is_caught, mutated
from tests.kernel_reference import DTYPES, assert_as_exact

RATES = [0.7, 0.03, 1e-5, 0.2, 2.0]


def arguments(B=2, T=40, H=3, K=32, V=64, dtype=mx.bfloat16, rates=None, has_state=True, mask=None, seed=0):
    keys = mx.random.split(mx.random.key(seed), 4)
    q, k = (mx.random.normal((B, T, H, K), key=keys[i]).astype(dtype) for i in range(2))
    v = mx.random.normal((B, T, H, V), key=keys[2]).astype(dtype)
    state = mx.random.normal((B, H, K, V), key=keys[3]) if has_state else None
    return q, k, v, mx.array((rates or RATES * 7)[:H]), K**-0.5, state, mask


def check(backend, args, segments=1):
    with launch.use(backend):
        actual = simd_chunk_lightning_attn(*args, segments=segments)
    exact = reference.lightning_attn(*args)
    for a, n, e in zip(actual, naive_lightning_attn(*args), exact, strict=True):
        assert_as_exact(a, n, e)


@pytest.fixture
def narrow(monkeypatch):
    """Products take operands of bfloat16, as on tensor cores."""
    tuning = simd_chunk.Tuning((mx.bfloat16,), 1)
    monkeypatch.setattr(simd_chunk, "TUNING", dict.fromkeys(simd_chunk.TUNING, tuning))
    monkeypatch.setattr(choices, "NOTHING", choices.Held({}))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [*((32, 64, d) for d in DTYPES), (64, 32, mx.float32), (64, 64, mx.float16), (96, 32, mx.bfloat16)],
)
def test_heads_of_every_size(backend, K, V, dtype):
    check(backend, arguments(B=1, H=2, K=K, V=V, dtype=dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("K", "V", "dtype"), [(128, 128, mx.bfloat16), (256, 32, mx.bfloat16), (256, 64, mx.float32)])
def test_large_heads(backend, K, V, dtype):
    check(backend, arguments(B=1, T=34, H=1, K=K, V=V, dtype=dtype))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("T", [1, 7, 8, 31, 32, 33, 63, 64, 65])
def test_ragged_ends(backend, T):
    check(backend, arguments(B=1, T=T, H=2))


@pytest.mark.parametrize("backend", backends())
def test_without_a_state(backend):
    check(backend, arguments(has_state=False))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("rate", [0.0, 1e-6, 5.0, 90.0, 1e4])
def test_extreme_decays(backend, rate):
    check(backend, arguments(dtype=mx.float32, rates=[rate, 0.5, rate]))


MASKS = {
    "left": mx.arange(40)[None] >= mx.array([[35], [3]]),
    "right": mx.arange(40)[None] < mx.array([[1], [33]]),
    "holes": mx.random.bernoulli(0.6, (2, 40), key=mx.random.key(9)),
    "nothing": mx.zeros((2, 40), mx.bool_),
}


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("which", MASKS)
def test_rows_of_their_own_length(backend, which, segments):
    check(backend, arguments(mask=MASKS[which]), segments)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("T", [33, 64, 65, 100])
def test_time_in_segments(backend, segments, T):
    check(backend, arguments(B=1, T=T, H=2), segments)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("segments", [1, 2])
def test_narrow_operands_lose_nothing(backend, segments, narrow):
    check(backend, arguments(B=1, T=40, H=2, K=64, V=32), segments)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("segments", [1, 2])
def test_nothing_of_a_masked_token_reaches_the_state(backend, segments):
    q, k, v, *rest = arguments(mask=MASKS["left"])
    keep = MASKS["left"][..., None, None]
    nan = mx.array(mx.nan, mx.bfloat16)
    with launch.use(backend):
        _, expected = simd_chunk_lightning_attn(q, k, v, *rest, segments=segments)
        wild = [mx.where(keep, x, nan) for x in (q, k, v)]
        _, actual = simd_chunk_lightning_attn(*wild, *rest, segments=segments)
    assert_close(actual, expected, 0)


@pytest.mark.parametrize("backend", backends())
def test_transposed_views_are_read_as_they_are(backend):
    q, k, v, *rest = arguments()
    views = [mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    check(backend, (*views, *rest))


@pytest.mark.parametrize("backend", backends("fast"))
@pytest.mark.parametrize(("T", "segments"), [(7, 1), (63, 1), (200, 1), (200, 3)])
def test_the_heads_of_mini(backend, T, segments):
    check(backend, arguments(B=1, T=T, H=3, K=128, V=128), segments)


@pytest.mark.parametrize("backend", backends("fast"))
def test_narrow_operands_lose_nothing_with_the_heads_of_mini(backend, narrow):
    check(backend, arguments(B=1, T=70, H=3, K=128, V=128, mask=mx.arange(70)[None] >= 5))


@pytest.mark.parametrize("backend", backends("fast"))
def test_a_split_prompt_equals_the_whole(backend):
    q, k, v, rate, scale, state, _ = arguments(B=1, T=70, H=2, dtype=mx.float32)
    with launch.use(backend):
        whole, end = simd_chunk_lightning_attn(q, k, v, rate, scale, state)
        for at in (1, 31, 32, 45):
            a, S = simd_chunk_lightning_attn(q[:, :at], k[:, :at], v[:, :at], rate, scale, state)
            b, S = simd_chunk_lightning_attn(q[:, at:], k[:, at:], v[:, at:], rate, scale, S)
            assert_close(mx.concatenate([a, b], axis=1), whole, 1e-6)
            assert_close(S, end, 1e-6)


@pytest.mark.parametrize(
    ("kernel", "n"),
    [(kernel, n) for kernel in (simd_chunk.KERNEL, simd_chunk.SEGMENT_STATES) for n in barriers(kernel)],
)
def test_a_missing_barrier_is_caught(kernel, n):
    args = arguments(B=1, T=68, H=2)
    with mutated(kernel, (BARRIER, ""), occurrence=n):
        assert is_caught(lambda: simd_chunk_lightning_attn(*args, segments=2), naive_lightning_attn(*args))


OUTPUT_CHANGES = [
    ("row < left", "row <= left"),
    ("lane < left", "lane <= left"),
    ("column + e <= row", "column + e < row"),
    ("n < segment; n++", "n < segment - 1; n++"),
    ("i = j; i < C / 8", "i = j + 1; i < C / 8"),
    ("BLOCKS * (BLOCKS + 1) / 2", "BLOCKS * (BLOCKS + 1) / 2 - 1"),
    ("segment == segments - 1", "segment == segments - 2"),
    ("i < C * WIDTH / 4", "i <= C * WIDTH / 4"),
    ("row < left &&", "row <= left &&"),
]
SEGMENT_CHANGES = [
    ("end = begin + sizes[0]", "end = begin + sizes[0] + 1"),
    ("lane < C &&", "lane < C - 1 &&"),
    ("i < C * WIDTH / 4", "i < C * WIDTH / 4 - 1"),
    ("j < C / 8; j += BLOCK", "j < C / 8 - 1; j += BLOCK"),
]


@pytest.mark.parametrize(
    ("kernel", "change"),
    [(simd_chunk.KERNEL, c) for c in OUTPUT_CHANGES] + [(simd_chunk.SEGMENT_STATES, c) for c in SEGMENT_CHANGES],
)
def test_a_bound_off_by_one_is_caught(kernel, change):
    args = arguments(B=1, T=65, H=2)
    with mutated(kernel, change):
        assert is_caught(lambda: simd_chunk_lightning_attn(*args, segments=2), naive_lightning_attn(*args))


@pytest.mark.parametrize("K", range(32, 257, 32))
@pytest.mark.parametrize("V", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_memory_and_registers_are_within_limits(K, V, dtype):
    C = simd_chunk.chunk_tokens(K, dtype)
    simdgroups, tiles = simd_chunk.split_columns(K, V)
    columns, pad = simdgroups * tiles * 8, 16 // dtype.size
    shared = C * (2 * (K + pad) + columns + pad) * dtype.size + 4 * (C * (C + 4) + 3 * C + 64)
    assert shared <= 32 * 1024
    assert V % columns == 0
    assert K // 8 * tiles * 2 <= 64


@pytest.mark.parametrize("T", [1, 255, 512, 2048, 100_000])
@pytest.mark.parametrize("H", [16, 32])
def test_segments_fill_the_gpu_and_are_whole_chunks(T, H):
    heads = mx.zeros((1, H, T, 128), mx.bfloat16)
    with launch.use(launch.Backend("cuda", print)):
        call, _ = find(simd_chunk._launch, (heads,) * 3 + (mx.zeros(H), 1.0, mx.zeros((1, H, 128, 128)), None, None))
    *states, outputs = call.launches
    count, segment_tokens = outputs.how["grid"][1], outputs.inputs[4].item()
    assert (count - 1) * segment_tokens < T <= count * segment_tokens
    assert segment_tokens % 32 == 0
    assert count <= max(1, T // simd_chunk.MIN_SEGMENT_TOKENS, 1)
    assert (not states) == (count == 1)
    if T > 10_000:
        assert count * H * 2 >= 264


def test_what_is_not_supported_is_refused():
    q, k, v, rate, *_ = arguments()
    assert simd_chunk.supports(q, k, v, rate)
    assert not simd_chunk.supports(q, k.astype(mx.float16), v, rate)
    assert not simd_chunk.supports(q[:, :0], k[:, :0], v[:, :0], rate)
    assert not simd_chunk.supports(q[..., :24], k[..., :24], v, rate)
    assert not simd_chunk.supports(q, k, v, rate[:2])
    with pytest.raises(ValueError, match=r"\[simd_chunk_lightning_attn\] no kernel for q \(2, 0, 3, 32\)"):
        simd_chunk_lightning_attn(q[:, :0], k[:, :0], v[:, :0], rate, 1.0)
    with pytest.raises(ValueError, match="state must be"):
        simd_chunk_lightning_attn(q, k, v, rate, 1.0, mx.zeros((2, 3, 64, 32)))
    with pytest.raises(ValueError, match="mask must be"):
        simd_chunk_lightning_attn(q, k, v, rate, 1.0, None, mx.ones((2, 41), mx.bool_))
