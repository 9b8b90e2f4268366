// Barriers and SIMD-groups: a warp is a SIMD-group, both are 32 consecutive linear thread indices.
#pragma once
#include "math.cuh"

namespace msl {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
enum memory_order { memory_order_relaxed, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __syncwarp(); }
MSL_FN void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) { __threadfence(); }

constexpr uint kAllLanes = 0xffffffffu;

// The type in which a value crosses lanes.
template <class T> struct lane_type { using type = T; };
template <> struct lane_type<half> { using type = float; };
template <> struct lane_type<bfloat> { using type = float; };
template <> struct lane_type<short> { using type = int; };
template <> struct lane_type<signed char> { using type = int; };
template <> struct lane_type<char> { using type = int; };
template <> struct lane_type<bool> { using type = int; };
template <> struct lane_type<ushort> { using type = uint; };
template <> struct lane_type<uchar> { using type = uint; };

// Ascending butterfly: the order of the simulator, and half rounds after each step as there.
#define MSL_REDUCTION(name, WIDTH, expr)                                     \
  template <class T> MSL_FN T name(T x) {                                    \
    using wide = typename lane_type<T>::type;                                \
    wide a = x;                                                              \
    _Pragma("unroll") for (int step = 1; step < WIDTH; step *= 2) {          \
      wide b = __shfl_xor_sync(kAllLanes, a, step);                          \
      a = is_16bit_float<T> ? (wide)T(expr) : (wide)(expr);                  \
    }                                                                        \
    return T(a);                                                             \
  }                                                                          \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> v) {             \
    MSL_EACH(N) v[i] = name(v[i]);                                           \
    return v;                                                                \
  }
#define MSL_REDUCTIONS(name, expr) MSL_REDUCTION(simd_##name, 32, expr) MSL_REDUCTION(quad_##name, 4, expr)
MSL_REDUCTIONS(sum, a + b)
MSL_REDUCTIONS(product, a* b)
MSL_REDUCTIONS(min, (b < a ? b : a))
MSL_REDUCTIONS(max, (a < b ? b : a))
#undef MSL_REDUCTIONS
#undef MSL_REDUCTION
// Of whole numbers in one instruction.
MSL_FN uint simd_min(uint x) { return __reduce_min_sync(kAllLanes, x); }
MSL_FN uint simd_max(uint x) { return __reduce_max_sync(kAllLanes, x); }
MSL_FN uint simd_sum(uint x) { return __reduce_add_sync(kAllLanes, x); }
MSL_FN int simd_min(int x) { return __reduce_min_sync(kAllLanes, x); }
MSL_FN int simd_max(int x) { return __reduce_max_sync(kAllLanes, x); }
MSL_FN int simd_sum(int x) { return __reduce_add_sync(kAllLanes, x); }
template <class T> MSL_FN T simd_and(T x) { return (T)__reduce_and_sync(kAllLanes, (uint)x); }
template <class T> MSL_FN T simd_or(T x) { return (T)__reduce_or_sync(kAllLanes, (uint)x); }
template <class T> MSL_FN T simd_xor(T x) { return (T)__reduce_xor_sync(kAllLanes, (uint)x); }

#define MSL_SHUFFLE(name, from, WIDTH)                                                     \
  template <class T> MSL_FN T name(T x, ushort by) {                                       \
    typename lane_type<T>::type a = x;                                                     \
    return T(from(kAllLanes, a, (int)by, WIDTH));                                          \
  }                                                                                        \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> v, ushort by) {                \
    MSL_EACH(N) v[i] = name(v[i], by);                                                     \
    return v;                                                                              \
  }
#define MSL_SHUFFLES(name, from) MSL_SHUFFLE(simd_##name, from, 32) MSL_SHUFFLE(quad_##name, from, 4)
MSL_SHUFFLES(shuffle, __shfl_sync)
MSL_SHUFFLES(broadcast, __shfl_sync)
MSL_SHUFFLES(shuffle_xor, __shfl_xor_sync)
MSL_SHUFFLES(shuffle_up, __shfl_up_sync)
MSL_SHUFFLES(shuffle_down, __shfl_down_sync)
#undef MSL_SHUFFLES
#undef MSL_SHUFFLE
template <class T> MSL_FN T simd_shuffle_rotate_up(T x, ushort by) {
  return simd_shuffle(x, (ushort)((ptx_lane() - by) & 31));
}
template <class T> MSL_FN T simd_shuffle_rotate_down(T x, ushort by) {
  return simd_shuffle(x, (ushort)((ptx_lane() + by) & 31));
}
template <class T> MSL_FN T simd_shuffle_and_fill_up(T x, T fill, ushort by, ushort modulo = 32) {
  uint in_segment = ptx_lane() % modulo;
  T moved = simd_shuffle(x, (ushort)((ptx_lane() - by) & 31));
  return in_segment >= by ? moved : fill;
}
template <class T> MSL_FN T simd_shuffle_and_fill_down(T x, T fill, ushort by, ushort modulo = 32) {
  uint in_segment = ptx_lane() % modulo;
  T moved = simd_shuffle(x, (ushort)((ptx_lane() + by) & 31));
  return in_segment + by < modulo ? moved : fill;
}
template <class T> MSL_FN T simd_broadcast_first(T x) { return simd_broadcast(x, (ushort)(__ffs(__activemask()) - 1)); }

#define MSL_PREFIX(name, neutral, expr)                                  \
  template <class T> MSL_FN T simd_prefix_inclusive_##name(T x) {        \
    using wide = typename lane_type<T>::type;                            \
    wide a = x;                                                          \
    _Pragma("unroll") for (uint step = 1; step < 32; step *= 2) {        \
      wide b = __shfl_up_sync(kAllLanes, a, step);                       \
      if (ptx_lane() >= step) a = expr;                                  \
    }                                                                    \
    return T(a);                                                         \
  }                                                                      \
  template <class T> MSL_FN T simd_prefix_exclusive_##name(T x) {        \
    T before = simd_shuffle_up(simd_prefix_inclusive_##name(x), 1);      \
    return ptx_lane() == 0 ? T(neutral) : before;                        \
  }
MSL_PREFIX(sum, 0, a + b)
MSL_PREFIX(product, 1, a* b)
#undef MSL_PREFIX

struct simd_vote {
  using vote_t = ulong;
  ulong v;
  MSL_FN explicit operator ulong() const { return v; }
  MSL_FN bool all() const { return v == kAllLanes; }
  MSL_FN bool any() const { return v != 0; }
};
MSL_FN simd_vote simd_ballot(bool b) { return simd_vote{__ballot_sync(kAllLanes, b)}; }
MSL_FN bool simd_any(bool b) { return __any_sync(kAllLanes, b); }
MSL_FN bool simd_all(bool b) { return __all_sync(kAllLanes, b); }
MSL_FN bool simd_is_first() { return ptx_lane() == (uint)__ffs(__activemask()) - 1; }

// Relaxed atomics, as Metal's.
template <class T> struct atomic { T v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
template <class T> MSL_FN T atomic_load_explicit(const volatile atomic<T>* o, memory_order) { return o->v; }
template <class T> MSL_FN void atomic_store_explicit(volatile atomic<T>* o, msl_same<T> x, memory_order) { o->v = x; }
#define MSL_ATOMIC(name, builtin)                                                             \
  template <class T> MSL_FN T name(volatile atomic<T>* o, msl_same<T> x, memory_order) {      \
    return builtin((T*)&o->v, x);                                                             \
  }
MSL_ATOMIC(atomic_exchange_explicit, ::atomicExch)
MSL_ATOMIC(atomic_fetch_add_explicit, ::atomicAdd)
MSL_ATOMIC(atomic_fetch_min_explicit, ::atomicMin)
MSL_ATOMIC(atomic_fetch_max_explicit, ::atomicMax)
MSL_ATOMIC(atomic_fetch_and_explicit, ::atomicAnd)
MSL_ATOMIC(atomic_fetch_or_explicit, ::atomicOr)
MSL_ATOMIC(atomic_fetch_xor_explicit, ::atomicXor)
#undef MSL_ATOMIC
template <class T> MSL_FN T atomic_fetch_sub_explicit(volatile atomic<T>* o, msl_same<T> x, memory_order) {
  return ::atomicAdd((T*)&o->v, (T)-x);
}
template <class T>
MSL_FN bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* o, T* expected, msl_same<T> x, memory_order,
                                                  memory_order) {
  uint seen = ::atomicCAS((uint*)&o->v, as_type<uint>(*expected), as_type<uint>(x));
  bool is_done = seen == as_type<uint>(*expected);
  *expected = as_type<T>(seen);
  return is_done;
}

}  // namespace msl
