// <metal_compute>, <metal_simdgroup>, <metal_quadgroup>, <metal_simdgroup_matrix>: barriers and SIMD-groups.
#pragma once

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
enum memory_order { memory_order_relaxed, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
METAL_FUNC void threadgroup_barrier(mem_flags m, MSL_SITE) { msl_tg_barrier((uint)m, msl_f, msl_l); }
METAL_FUNC void simdgroup_barrier(mem_flags m, MSL_SITE) { msl_sg_barrier((uint)m, msl_f, msl_l); }
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

// Only the types that Metal accepts: no 64-bit integers, no bool, no bfloat (MLX's headers add bfloat).
template <class T> struct msl_lane_type { static constexpr int kind = -1; };
#define MSL_LANE_TYPE(T, KIND, WIDE)      \
  template <> struct msl_lane_type<T> {   \
    static constexpr int kind = KIND;     \
    using wide = WIDE;                    \
  };
MSL_LANE_TYPE(float, MSL_T_F32, float)
MSL_LANE_TYPE(half, MSL_T_F16, float)
MSL_LANE_TYPE(int, MSL_T_I32, int)
MSL_LANE_TYPE(short, MSL_T_I32, int)
MSL_LANE_TYPE(char, MSL_T_I32, int)
MSL_LANE_TYPE(signed char, MSL_T_I32, int)
MSL_LANE_TYPE(uint, MSL_T_U32, uint)
MSL_LANE_TYPE(ushort, MSL_T_U32, uint)
MSL_LANE_TYPE(uchar, MSL_T_U32, uint)
#undef MSL_LANE_TYPE
template <class T> constexpr bool msl_is_lane_type = msl_lane_type<T>::kind >= 0;
template <class T> struct msl_shuffles { static constexpr bool value = msl_is_lane_type<T>; };
template <class T, int N> struct msl_shuffles<vec<T, N>> { static constexpr bool value = msl_is_lane_type<T>; };
#define MSL_REQUIRE(condition) static_assert(condition, "Metal has no such SIMD function for this type");

#define MSL_REDUCTION(name, OP, WIDTH)                                                                     \
  template <class T> METAL_FUNC T name(T x, MSL_SITE) {                                                    \
    MSL_REQUIRE(msl_is_lane_type<T>)                                                                       \
    typename msl_lane_type<T>::wide v = x;                                                                 \
    msl_reduce(&v, msl_lane_type<T>::kind, OP, WIDTH, msl_f, msl_l);                                       \
    return (T)v;                                                                                           \
  }                                                                                                        \
  template <class T, int N, enable_if_t<msl_is_lane_type<T>, int> = 0>                                     \
  METAL_FUNC vec<T, N> name(vec<T, N> x, MSL_SITE) {                                                       \
    for (int i = 0; i < N; i++) x[i] = name((T)x[i], msl_f, msl_l);                                        \
    return x;                                                                                              \
  }
#define MSL_REDUCTIONS(name, OP) MSL_REDUCTION(simd_##name, OP, 32) MSL_REDUCTION(quad_##name, OP, 4)
MSL_REDUCTIONS(sum, MSL_SUM)
MSL_REDUCTIONS(product, MSL_PROD)
MSL_REDUCTIONS(min, MSL_MIN)
MSL_REDUCTIONS(max, MSL_MAX)
MSL_REDUCTION(simd_and, MSL_AND, 32)
MSL_REDUCTION(simd_or, MSL_OR, 32)
MSL_REDUCTION(simd_xor, MSL_XOR, 32)

#define MSL_PREFIX(name, OP, KIND)                                     \
  template <class T, enable_if_t<msl_is_lane_type<T>, int> = 0>        \
  METAL_FUNC T name(T x, MSL_SITE) {                                   \
    typename msl_lane_type<T>::wide v = x;                             \
    msl_scan(&v, msl_lane_type<T>::kind, OP, KIND, msl_f, msl_l);      \
    return (T)v;                                                       \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, MSL_SUM, MSL_SCAN_INC)
MSL_PREFIX(simd_prefix_exclusive_sum, MSL_SUM, MSL_SCAN_EXC)
MSL_PREFIX(simd_prefix_inclusive_product, MSL_PROD, MSL_SCAN_INC)
MSL_PREFIX(simd_prefix_exclusive_product, MSL_PROD, MSL_SCAN_EXC)

#define MSL_SHUFFLE(name, MODE, WIDTH)                                             \
  template <class T> METAL_FUNC T name(T x, ushort a, MSL_SITE) {                  \
    MSL_REQUIRE(msl_shuffles<T>::value)                                            \
    msl_shuffle(&x, sizeof(T), MODE, a, nullptr, 0, WIDTH, msl_f, msl_l);          \
    return x;                                                                      \
  }
#define MSL_SHUFFLES(name, MODE) MSL_SHUFFLE(simd_##name, MODE, 32) MSL_SHUFFLE(quad_##name, MODE, 4)
MSL_SHUFFLES(shuffle, MSL_SHUF_IDX)
MSL_SHUFFLES(broadcast, MSL_SHUF_IDX)
MSL_SHUFFLES(shuffle_xor, MSL_SHUF_XOR)
MSL_SHUFFLES(shuffle_up, MSL_SHUF_UP)
MSL_SHUFFLES(shuffle_down, MSL_SHUF_DOWN)
MSL_SHUFFLE(simd_shuffle_rotate_up, MSL_ROT_UP, 32)
MSL_SHUFFLE(simd_shuffle_rotate_down, MSL_ROT_DOWN, 32)

#define MSL_SHUFFLE_FILL(name, MODE)                                                              \
  template <class T> METAL_FUNC T name(T x, T fill, ushort by, ushort modulo = 32, MSL_SITE) {    \
    MSL_REQUIRE(msl_shuffles<T>::value)                                                           \
    msl_shuffle(&x, sizeof(T), MODE, by, &fill, modulo, 32, msl_f, msl_l);                        \
    return x;                                                                                     \
  }
MSL_SHUFFLE_FILL(simd_shuffle_and_fill_up, MSL_SHUF_UP)
MSL_SHUFFLE_FILL(simd_shuffle_and_fill_down, MSL_SHUF_DOWN)

template <class T, enable_if_t<msl_shuffles<T>::value, int> = 0> METAL_FUNC T simd_broadcast_first(T x, MSL_SITE) {
  int first = __builtin_ctz(msl_ballot(true, msl_f, msl_l));
  msl_shuffle(&x, sizeof(T), MSL_SHUF_IDX, first, nullptr, 0, 32, msl_f, msl_l);
  return x;
}
struct simd_vote {
  using vote_t = ulong;
  ulong v;
  explicit operator ulong() const { return v; }
  bool all() const { return v == 0xffffffffu; }
  bool any() const { return v != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool b, MSL_SITE) { return simd_vote{msl_ballot(b, msl_f, msl_l)}; }
METAL_FUNC bool simd_any(bool b, MSL_SITE) { return msl_ballot(b, msl_f, msl_l) != 0; }
METAL_FUNC bool simd_all(bool b, MSL_SITE) { return msl_ballot(!b, msl_f, msl_l) == 0; }
METAL_FUNC bool simd_is_first(MSL_SITE) {
  return (uint)__builtin_ctz(msl_ballot(true, msl_f, msl_l)) == msl_self->lane;
}

// Lane -> element of a matrix as MLX's kernels assume it: two adjacent columns of one row in each lane.
METAL_FUNC void msl_matrix_position(thread int& row, thread int& column) {
  int lane = msl_self->lane, quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}
template <class T, int C, int R> struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8 simdgroup matrices exist");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    int row, column;
    msl_matrix_position(row, column);
    e[0] = row == column ? diagonal : T(0);
    e[1] = row == column + 1 ? diagonal : T(0);
  }
  thread vec<T, 2>& thread_elements() { return e; }
  thread const vec<T, 2>& thread_elements() const { return e; }
};
#include "../../../metal_kernels/twin/cuda/common_matrix.cuh"
METAL_FUNC ulong msl_matrix_index(int column, ulong row_elements, ulong2 origin, bool transpose) {
  int row, first;
  msl_matrix_position(row, first);
  column += first;
  return transpose ? (origin.y + column) * row_elements + origin.x + row
                   : (origin.y + row) * row_elements + origin.x + column;
}
#define MSL_MATRIX_MEMORY(SPACE)                                                                              \
  template <class T> METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* from, \
                                                    ulong row_elements = 8, ulong2 origin = ulong2(0),        \
                                                    bool transpose = false) {                                 \
    for (int i = 0; i < 2; i++) m.e[i] = from[msl_matrix_index(i, row_elements, origin, transpose)];          \
  }                                                                                                           \
  template <class T> METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE T* to,                \
                                                     ulong row_elements = 8, ulong2 origin = ulong2(0),       \
                                                     bool transpose = false) {                                \
    for (int i = 0; i < 2; i++) to[msl_matrix_index(i, row_elements, origin, transpose)] = m.e[i];            \
  }
MSL_MATRIX_MEMORY(device)
#ifndef MSL_ERASE
MSL_MATRIX_MEMORY(threadgroup)
#endif
#undef MSL_MATRIX_MEMORY
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                              simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_SITE) {
  float af[2] = {(float)a.e[0], (float)a.e[1]};
  float bf[2] = {(float)b.e[0], (float)b.e[1]};
  float cf[2] = {(float)c.e[0], (float)c.e[1]};
  float df[2];
  msl_mma(df, af, bf, cf, msl_f, msl_l);
  d.e[0] = (D)df[0];
  d.e[1] = (D)df[1];
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8>(0.0f), msl_f, msl_l);
}
template <class T>
METAL_FUNC simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
