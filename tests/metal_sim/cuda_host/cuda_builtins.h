// What NVRTC knows without headers, for clang on the simulator's runtime.
#pragma once
#include "../runtime/interface.h"

#define __device__
#define __global__
#define __forceinline__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define __shared__ static  // threadgroups run one after the other
#define memcpy __builtin_memcpy
typedef __SIZE_TYPE__ size_t;

struct msl_dim3 { unsigned x, y, z; };
#define threadIdx (*(const msl_dim3*)msl_self->pos_in_tg)
#define blockIdx (*(const msl_dim3*)msl_self->tg_pos)
#define blockDim (*(const msl_dim3*)msl_self->disp_tg)
#define gridDim (*(const msl_dim3*)msl_self->ntg)

extern "C" {
float expf(float), exp2f(float), logf(float), log2f(float), log10f(float), sinf(float), cosf(float), tanf(float);
float acosf(float), acoshf(float), asinf(float), asinhf(float), atanf(float), atanhf(float), ceilf(float);
float floorf(float), roundf(float), rintf(float), truncf(float), coshf(float), sinhf(float), tanhf(float);
float sqrtf(float), fabsf(float), powf(float, float), fminf(float, float), fmaxf(float, float), atan2f(float, float);
float fmodf(float, float), copysignf(float, float), fmaf(float, float, float), ldexpf(float, int);
}
inline float exp10f(float x) { return powf(10.0f, x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) { return __builtin_bitreverse32(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((long)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  by &= 31;
  return by ? high << by | low >> (32 - by) : high;
}

#define MSL_SITE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()
inline void __syncthreads(MSL_SITE) { msl_tg_barrier(3, file, line); }
inline void __syncwarp(MSL_SITE) { msl_sg_barrier(3, file, line); }
inline void __threadfence() {}
inline unsigned __activemask(MSL_SITE) { return msl_ballot(true, file, line); }
inline unsigned __ballot_sync(unsigned, bool b, MSL_SITE) { return msl_ballot(b, file, line); }
inline bool __any_sync(unsigned, bool b, MSL_SITE) { return msl_ballot(b, file, line) != 0; }
inline bool __all_sync(unsigned, bool b, MSL_SITE) { return msl_ballot(!b, file, line) == 0; }
#define MSL_HOST_SHUFFLE(name, MODE)                                                     \
  template <class T> T name(unsigned, T x, int by, int width = 32, MSL_SITE) {           \
    msl_shuffle(&x, sizeof x, MODE, by, nullptr, 0, width, file, line);                  \
    return x;                                                                            \
  }
MSL_HOST_SHUFFLE(__shfl_sync, MSL_SHUF_IDX)
MSL_HOST_SHUFFLE(__shfl_xor_sync, MSL_SHUF_XOR)
MSL_HOST_SHUFFLE(__shfl_up_sync, MSL_SHUF_UP)
MSL_HOST_SHUFFLE(__shfl_down_sync, MSL_SHUF_DOWN)
#define MSL_HOST_REDUCE(name, T, TYPE, OP)                          \
  inline T name(unsigned, T x, MSL_SITE) {                          \
    msl_reduce(&x, TYPE, OP, 32, file, line);                       \
    return x;                                                       \
  }
MSL_HOST_REDUCE(__reduce_and_sync, unsigned, MSL_T_U32, MSL_AND)
MSL_HOST_REDUCE(__reduce_or_sync, unsigned, MSL_T_U32, MSL_OR)
MSL_HOST_REDUCE(__reduce_xor_sync, unsigned, MSL_T_U32, MSL_XOR)
#define MSL_HOST_REDUCE_NUMBERS(name, OP)          \
  MSL_HOST_REDUCE(name, unsigned, MSL_T_U32, OP)   \
  MSL_HOST_REDUCE(name, int, MSL_T_I32, OP)
MSL_HOST_REDUCE_NUMBERS(__reduce_min_sync, MSL_MIN)
MSL_HOST_REDUCE_NUMBERS(__reduce_max_sync, MSL_MAX)
MSL_HOST_REDUCE_NUMBERS(__reduce_add_sync, MSL_SUM)

#define MSL_HOST_ATOMIC(name, expr)             \
  template <class T> T name(T* p, T x) {        \
    T old = *p;                                 \
    *p = expr;                                  \
    return old;                                 \
  }
MSL_HOST_ATOMIC(atomicExch, x)
MSL_HOST_ATOMIC(atomicAdd, old + x)
MSL_HOST_ATOMIC(atomicMin, (x < old ? x : old))
MSL_HOST_ATOMIC(atomicMax, (old < x ? x : old))
MSL_HOST_ATOMIC(atomicAnd, old& x)
MSL_HOST_ATOMIC(atomicOr, old | x)
MSL_HOST_ATOMIC(atomicXor, old ^ x)
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned x) {
  unsigned old = *p;
  if (old == expected) *p = x;
  return old;
}

// The entry hands a kernel its pointers and its int scalars in order.
template <class P> struct msl_cuda_argument {
  static P get(void* p) { return (P)p; }
};
template <> struct msl_cuda_argument<int> {
  static int get(void* p) { return *(const int*)p; }
};
template <> struct msl_cuda_argument<const int> : msl_cuda_argument<int> {};
template <int... I> struct msl_indices {};
template <class T, T... I> using msl_make_indices = msl_indices<I...>;
template <class... P, int... I> void msl_cuda_call(void (*f)(P...), msl_indices<I...>) {
  f(msl_cuda_argument<P>::get(msl_self->buffers[I])...);
}
template <class... P> void msl_cuda_call(void (*f)(P...)) {
  msl_cuda_call(f, __make_integer_seq<msl_make_indices, int, sizeof...(P)>{});
}
