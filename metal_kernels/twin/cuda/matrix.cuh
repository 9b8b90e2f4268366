// simdgroup_matrix: 8x8 tiles over a warp. Products of half or bfloat tiles run on tensor cores with float
// accumulators, all others through shuffles in float.
//
// Each lane holds two adjacent columns of one row. Which ones Metal does not say. By default the twin uses the order of
// the tensor cores (lane 4 r + p holds (r, 2 p) and (r, 2 p + 1)). Source that names thread_elements relies on Apple's
// order, so the twin then defines MSL_APPLE_LAYOUT, and products shuffle their tiles into the tensor cores' order and
// back. Source that works in either order says so by naming MSL_TENSOR_CORE_LAYOUT, in code or in a comment; the macro is
// defined where that order is in use.
#pragma once
#include "simd.cuh"

namespace msl {

#ifdef MSL_APPLE_LAYOUT
MSL_FN int matrix_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
MSL_FN int matrix_column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
MSL_FN int matrix_owner(int row, int column) {
  return ((row & 4) | (column & 4) >> 1) * 4 + (row & 3) * 2 + (column >> 1 & 1);
}
template <class T> MSL_FN T to_tensor_core(T x) {
  int lane = ptx_lane();
  return __shfl_sync(kAllLanes, x, matrix_owner(lane / 4, lane % 4 * 2));
}
template <class T> MSL_FN T from_tensor_core(T x) {
  int lane = ptx_lane();
  return __shfl_sync(kAllLanes, x, matrix_row(lane) * 4 + matrix_column(lane) / 2);
}
#else
#define MSL_TENSOR_CORE_LAYOUT 1
MSL_FN int matrix_row(int lane) { return lane / 4; }
MSL_FN int matrix_column(int lane) { return lane % 4 * 2; }
MSL_FN int matrix_owner(int row, int column) { return row * 4 + column / 2; }
template <class T> MSL_FN T to_tensor_core(T x) { return x; }
template <class T> MSL_FN T from_tensor_core(T x) { return x; }
#endif

// Whether a transposed tile is read along rows of memory and then turned by one instruction.
template <class T> constexpr bool turns_tiles() {
#ifdef MSL_APPLE_LAYOUT
  return false;
#else
  return is_16bit_float<T>;
#endif
}
// What a lane holds of a tile. Where tiles turn, a tile that was loaded transposed keeps what it read, and one that was a
// right operand what it was turned into: that is the form in which the tensor core wants a right operand. The compiler
// drops whichever form is not used, but would turn a tile again for each product.
template <class T, bool TURNS> struct matrix_lane {
  vec<T, 2> e;
  MSL_FN void changed() {}
};
template <class T> struct matrix_lane<T, true> {
  vec<T, 2> e;
  mutable uint turned;
  mutable bool has_turned = false;
  MSL_FN void changed() { has_turned = false; }
};

template <class T, int C, int R> struct simdgroup_matrix : matrix_lane<T, turns_tiles<T>()> {
  static_assert(C == 8 && R == 8, "only 8x8 simdgroup matrices exist");
  using matrix_lane<T, turns_tiles<T>()>::e;
  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T diagonal) {
    int row = matrix_row(ptx_lane()), column = matrix_column(ptx_lane());
    e.x = row == column ? diagonal : T(0);
    e.y = row == column + 1 ? diagonal : T(0);
  }
  MSL_FN vec<T, 2>& thread_elements() {
    this->changed();
    return e;
  }
  MSL_FN const vec<T, 2>& thread_elements() const { return e; }
};
#include "common_matrix.cuh"

// Whether the pairs of every lane are aligned: the same answer in all lanes. The compiler knows nothing of an address in
// threadgroup memory, so source whose tiles all start at even elements promises it by naming MSL_EVEN_PAIRS.
template <class T> MSL_FN bool are_pairs_aligned(const T* base, ulong row_elements, ulong2 origin) {
#ifdef MSL_EVEN_PAIRS
  return true;
#else
  return ((ulong)base % (2 * sizeof(T)) | row_elements % 2 | origin.x % 2) == 0;
#endif
}
// The pair of this lane; within a tile 32 bits are enough.
template <class T> MSL_FN T* lane_pair(T* base, ulong row_elements, ulong2 origin) {
  int lane = ptx_lane();
  return base + (origin.y * row_elements + origin.x) + (matrix_row(lane) * (int)row_elements + matrix_column(lane));
}
template <class T>
MSL_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong row_elements = 8,
                           ulong2 origin = ulong2(0, 0), bool transpose = false) {
  int row = matrix_row(ptx_lane()), column = matrix_column(ptx_lane());
  if (transpose && !turns_tiles<T>()) {
    m.e.x = from[(origin.y + column) * row_elements + origin.x + row];
    m.e.y = from[(origin.y + column + 1) * row_elements + origin.x + row];
    return;
  }
  const T* pair = lane_pair(from, row_elements, origin);
  if (are_pairs_aligned(from, row_elements, origin)) {
    m.e = *(const vec<T, 2>*)pair;
  } else {
    m.e.x = pair[0];
    m.e.y = pair[1];
  }
  m.changed();
  if constexpr (turns_tiles<T>()) {
    if (transpose) {
      m.turned = as_type<uint>(m.e);
      m.has_turned = true;
      m.e = as_type<vec<T, 2>>(ptx_transpose(m.turned));
    }
  }
}
template <class T>
MSL_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong row_elements = 8, ulong2 origin = ulong2(0, 0),
                            bool transpose = false) {
  int row = matrix_row(ptx_lane()), column = matrix_column(ptx_lane());
  if (transpose && !turns_tiles<T>()) {
    to[(origin.y + column) * row_elements + origin.x + row] = m.e.x;
    to[(origin.y + column + 1) * row_elements + origin.x + row] = m.e.y;
    return;
  }
  if constexpr (turns_tiles<T>()) {
    if (transpose) m.e = as_type<vec<T, 2>>(ptx_transpose(as_type<uint>(m.e)));
  }
  T* pair = lane_pair(to, row_elements, origin);
  if (are_pairs_aligned(to, row_elements, origin)) {
    *(vec<T, 2>*)pair = m.e;
  } else {
    pair[0] = m.e.x;
    pair[1] = m.e.y;
  }
}

template <class A, class B> MSL_FN float2 multiply_by_shuffles(A a, B b, float2 c) {
  int row = matrix_row(ptx_lane()), column = matrix_column(ptx_lane());
  float a0 = (float)a.x, a1 = (float)a.y, b0 = (float)b.x, b1 = (float)b.y;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    float left = __shfl_sync(kAllLanes, k % 2 ? a1 : a0, matrix_owner(row, k));
    int owner = matrix_owner(k, column);
    c.x = ::fmaf(left, __shfl_sync(kAllLanes, b0, owner), c.x);
    c.y = ::fmaf(left, __shfl_sync(kAllLanes, b1, owner), c.y);
  }
  return c;
}
template <class T> MSL_FN uint left_operand(const simdgroup_matrix<T, 8, 8>& a) {
  return to_tensor_core(as_type<uint>(a.e));
}
template <class T> MSL_FN uint right_operand(const simdgroup_matrix<T, 8, 8>& b) {
  if constexpr (turns_tiles<T>()) {
    if (!b.has_turned) b.turned = ptx_transpose(as_type<uint>(b.e));
    b.has_turned = true;
    return b.turned;
  }
  return ptx_transpose(to_tensor_core(as_type<uint>(b.e)));
}
template <class T>
MSL_FN float2 multiply_on_tensor_core(const simdgroup_matrix<T, 8, 8>& a, const simdgroup_matrix<T, 8, 8>& b, float2 c) {
  uint left = left_operand(a), right = right_operand(b);
  float c0 = to_tensor_core(c.x), c1 = to_tensor_core(c.y), d0, d1;
  if constexpr (is_same_v<T, half>) {
    ptx_mma_half(d0, d1, left, right, c0, c1);
  } else {
    ptx_mma_bfloat(d0, d1, left, right, c0, c1);
  }
  return float2(from_tensor_core(d0), from_tensor_core(d1));
}

template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  float2 start((float)c.e.x, (float)c.e.y), sum;
  if constexpr (is_same_v<A, B> && is_16bit_float<A>) {
    sum = multiply_on_tensor_core(a, b, start);
  } else {
    sum = multiply_by_shuffles(a.e, b.e, start);
  }
  d.e = vec<D, 2>(D(sum.x), D(sum.y));
  d.changed();
}
// Not Metal: d0 += a0 b0 + a1 b1 and d1 += a2 b0 + a3 b1 in one instruction of twice the size, for kernels that test
// #ifdef MSL_MULTIPLY_16X8X16.
#define MSL_MULTIPLY_16X8X16(d0, d1, a0, a1, a2, a3, b0, b1) multiply_16x8x16(d0, d1, a0, a1, a2, a3, b0, b1)
template <class T>
MSL_FN void multiply_16x8x16(simdgroup_matrix<float, 8, 8>& d0, simdgroup_matrix<float, 8, 8>& d1,
                             const simdgroup_matrix<T, 8, 8>& a0, const simdgroup_matrix<T, 8, 8>& a1,
                             const simdgroup_matrix<T, 8, 8>& a2, const simdgroup_matrix<T, 8, 8>& a3,
                             const simdgroup_matrix<T, 8, 8>& b0, const simdgroup_matrix<T, 8, 8>& b1) {
  static_assert(is_16bit_float<T>, "tensor cores multiply half and bfloat");
  float d[4] = {to_tensor_core(d0.e.x), to_tensor_core(d0.e.y), to_tensor_core(d1.e.x), to_tensor_core(d1.e.y)};
  uint left[4] = {left_operand(a0), left_operand(a1), left_operand(a2), left_operand(a3)};
  if constexpr (is_same_v<T, half>) {
    ptx_mma_half_tall(d, left[0], left[1], left[2], left[3], right_operand(b0), right_operand(b1));
  } else {
    ptx_mma_bfloat_tall(d, left[0], left[1], left[2], left[3], right_operand(b0), right_operand(b1));
  }
  d0.e = float2(from_tensor_core(d[0]), from_tensor_core(d[1]));
  d1.e = float2(from_tensor_core(d[2]), from_tensor_core(d[3]));
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8>(0.0f));
}
template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace msl
