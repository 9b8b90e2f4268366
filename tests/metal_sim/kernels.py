"""Kernels that several tests run: a tiled product with simdgroup_matrix, and one of every kind of SIMD function."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metal_kernels.twin.spec import KernelSpec

TILE_HEADER = """
constant constexpr int BT = 32;
template <typename T>
METAL_FUNC void load_tile(const device T* src, int ld, threadgroup T* dst, uint t, uint nt) {
  for (uint i = t; i < BT * BT / 4; i += nt) {
    int r = i / (BT / 4), c = (i % (BT / 4)) * 4;
    for (int j = 0; j < 4; j++) dst[r * (BT + 8) + c + j] = src[r * ld + c + j];
  }
}
"""
TILE_SOURCE = """
  threadgroup T As[BT * (BT + 8)];
  threadgroup T Bs[BT * (BT + 8)];
  uint t = thread_index_in_threadgroup, sg = simdgroup_index_in_threadgroup;
  int row = threadgroup_position_in_grid.y * BT, col = threadgroup_position_in_grid.x * BT;
  simdgroup_matrix<float, 8, 8> acc[4];
  for (int j = 0; j < 4; j++) acc[j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  for (int k = 0; k < K; k += BT) {
    load_tile<T>(a + row * K + k, K, As, t, 128);
    if (TB) load_tile<T>(b + col * K + k, K, Bs, t, 128);
    else load_tile<T>(b + k * N + col, N, Bs, t, 128);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int kk = 0; kk < BT; kk += 8) {
      simdgroup_matrix<T, 8, 8> A; simdgroup_matrix<T, 8, 8> B;
      simdgroup_load(A, As + sg * 8 * (BT + 8) + kk, BT + 8);
      for (int j = 0; j < 4; j++) {
        if (TB) simdgroup_load(B, Bs + j * 8 * (BT + 8) + kk, BT + 8, ulong2(0, 0), true);
        else simdgroup_load(B, Bs + kk * (BT + 8) + j * 8, BT + 8);
        simdgroup_multiply_accumulate(acc[j], A, B, acc[j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int j = 0; j < 4; j++) simdgroup_store(acc[j], out + (row + sg * 8) * N + col + j * 8, N);
  if (t == 0) atomic_fetch_add_explicit((device atomic_uint*)count, 1u, memory_order_relaxed);
"""
# Scales each element by 1 + its row: the elements of a lane, in Apple's order.
APPLE_ELEMENTS = """
  uint lane = thread_index_in_simdgroup;
  int element_row = (lane / 4 & 4) + lane / 2 % 4;
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 2; i++) acc[j].thread_elements()[i] *= float(row + sg * 8 + element_row + 1);
  for (int j = 0; j < 4; j++) simdgroup_store"""
BOTH_ELEMENTS = APPLE_ELEMENTS.replace(
    "  int element_row = (lane / 4 & 4) + lane / 2 % 4;",
    """#ifdef MSL_TENSOR_CORE_LAYOUT
  int element_row = lane / 4;
#else
  int element_row = (lane / 4 & 4) + lane / 2 % 4;
#endif""",
)
# Two columns of tiles at a time, and two steps of k: the form that the twin has one instruction for.
TALL = """#ifdef MSL_MULTIPLY_16X8X16
  if constexpr (sizeof(T) == 2) MSL_MULTIPLY_16X8X16(d[0], d[1], a[0], a[1], a[2], a[3], b[0], b[1]);
#endif"""
TALL_SOURCE = f"""
  simdgroup_matrix<T, 8, 8> a[4], b[2];
  simdgroup_matrix<float, 8, 8> d[2];
  for (int i = 0; i < 4; i++) simdgroup_load(a[i], x + i / 2 * 8 * 16 + i % 2 * 8, 16);
  for (int i = 0; i < 2; i++) simdgroup_load(b[i], y + (TB ? i * 8 : i * 8 * 8), TB ? 16 : 8, ulong2(0, 0), TB);
  for (int i = 0; i < 2; i++) d[i] = make_filled_simdgroup_matrix<float, 8>(1.0f);
{TALL}
  for (int i = 0; i < 2; i++) simdgroup_store(d[i], out + i * 64, 8);
"""
M, N, K = 64, 96, 128


def tiles(source: str = TILE_SOURCE) -> KernelSpec:
    """out = a b, or a b^T with TB, and the number of threadgroups."""
    return KernelSpec("tiles", ("a", "b"), ("out", "count"), source, TILE_HEADER)


def with_elements(elements: str) -> str:
    """The body, changing elements of lanes before it stores them."""
    return TILE_SOURCE.replace("  for (int j = 0; j < 4; j++) simdgroup_store", elements)


def tile_arguments(dtype: mx.Dtype, is_transposed: bool) -> dict[str, Any]:
    """A call of `tiles`."""
    mx.random.seed(1)
    a, b = mx.random.normal((M, K)), mx.random.normal((N, K) if is_transposed else (K, N))
    return {
        "inputs": [a.astype(dtype), b.astype(dtype)],
        "template": [("T", dtype), ("N", N), ("K", K), ("TB", is_transposed)],
        "grid": (N, M // 32 * 4, 1),
        "threadgroup": (32, 4, 1),
        "output_shapes": [(M, N), (1,)],
        "output_dtypes": [mx.float32, mx.uint32],
        "init_value": 0,
    }


def tile_reference(arguments: dict[str, Any]) -> mx.array:
    """What `tiles` computes."""
    a, b = (x.astype(mx.float32) for x in arguments["inputs"])
    return a @ (b.T if a.shape[1] == b.shape[1] else b)


SIMD_SOURCE = """
  uint i = thread_position_in_grid.x;
  T v = x[i];
  ushort lane = thread_index_in_simdgroup;
  const int W = 24;
  device float* o = out + i * W;
  o[0] = float(simd_sum(v));
  o[1] = float(simd_product(v));
  o[2] = float(simd_min(v));
  o[3] = float(simd_max(v));
  o[4] = float(simd_prefix_inclusive_sum(v));
  o[5] = float(simd_prefix_exclusive_sum(v));
  o[6] = float(simd_shuffle(v, ushort(31 - lane)));
  o[7] = float(simd_shuffle_xor(v, ushort(5)));
  o[8] = float(simd_shuffle_and_fill_up(v, T(-1), ushort(3)));
  o[9] = float(simd_shuffle_and_fill_down(v, T(-1), ushort(3)));
  o[10] = float(simd_broadcast(v, ushort(7)));
  o[11] = float(simd_shuffle_rotate_up(v, ushort(4)));
  o[12] = float(simd_shuffle_rotate_down(v, ushort(4)));
  o[13] = float(simd_any(v > T(3)));
  o[14] = float(simd_all(v > T(0)));
  o[15] = float(ulong(simd_ballot(v > T(2))) % 65521);
  o[16] = float(quad_sum(v));
  o[17] = float(quad_max(v));
  o[18] = float(quad_broadcast(v, ushort(2)));
  o[19] = float(simd_broadcast_first(v));
  o[20] = float(simd_is_first());
  o[21] = float(simd_or(uint(v)));
  o[22] = float(simd_and(uint(v)));
  o[23] = float(simd_xor(uint(v)));
"""


def simd_functions() -> KernelSpec:
    """Every kind of SIMD function, 24 results a thread."""
    return KernelSpec("simd_functions", ("x",), ("out",), SIMD_SOURCE)


def simd_arguments(dtype: mx.Dtype) -> dict[str, Any]:
    """A call of `simd_functions` on two SIMD-groups; the values are small integers, exact in every type and order."""
    mx.random.seed(2)
    return {
        "inputs": [mx.random.randint(1, 3, (64,)).astype(dtype)],
        "template": [("T", dtype)],
        "grid": (64, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(64, 24)],
        "output_dtypes": [mx.float32],
    }


MATH_SOURCE = """
  uint i = thread_position_in_grid.x;
  float v = x[i];
  T h = T(v);
  device float* o = out + i * 24;
  o[0] = metal::exp(v); o[1] = metal::log(v); o[2] = metal::precise::rsqrt(v); o[3] = metal::fast::tanh(v);
  o[4] = float(metal::exp(h)); o[5] = float(h * h + h); o[6] = float(max(h, T(1.5f))); o[7] = float(-h / T(3.0f));
  float4 a = float4(v, 2.0f * v, 3.0f * v, 4.0f);
  a += float4(1.0f) * v;
  o[8] = dot(a, a); o[9] = a.w; o[10] = float(as_type<uint>(v) >> 20);
  o[11] = float(clz(uint(v * 100.0f))); o[12] = float(popcount(uint(v * 100.0f))); o[13] = select(1.0f, 2.0f, v > 1.0f);
  o[14] = clamp(v, 0.5f, 1.25f); o[15] = float(min(int(v * 4.0f), 3)); o[16] = metal::abs(-v); o[17] = fma(v, v, 1.0f);
  o[18] = float(mulhi(0x80000000u, uint(v * 1000.0f))); o[19] = copysign(v, -1.0f);
  vec<T, 4> q = *(const device vec<T, 4>*)(y + 4 * (i % 4));
  o[20] = float(q.x) + float(q[1]) + float(q.z) * float(q.w);
  o[21] = float(rotate(as_type<uint>(v), 7u) >> 16); o[22] = sign(v - 1.0f); o[23] = float(T(v) < T(1.0f));
"""


def math_functions() -> KernelSpec:
    """Math, vectors and conversions, 24 results a thread."""
    return KernelSpec("math_functions", ("x", "y"), ("out",), MATH_SOURCE)


def math_arguments(dtype: mx.Dtype) -> dict[str, Any]:
    """A call of `math_functions`."""
    mx.random.seed(3)
    return {
        "inputs": [mx.random.uniform(0.1, 2.0, (64,)), mx.random.normal((16,)).astype(dtype)],
        "template": [("T", dtype)],
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
        "output_shapes": [(64, 24)],
        "output_dtypes": [mx.float32],
    }
