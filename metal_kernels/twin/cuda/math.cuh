// <metal_math>, <metal_integer>, <metal_relational>, <metal_geometric>.
#pragma once
#include "types.cuh"

namespace msl {

// A 16-bit float or a vector of floats goes through the function of float.
#define MSL_UNARY(name, expr)                                                               \
  MSL_FN float name(float x) { return expr; }                                               \
  template <class T> MSL_FN enable_if_t<is_16bit_float<T>, T> name(T x) { return T(name((float)x)); } \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> v) {                            \
    MSL_EACH(N) v[i] = T(name((float)v[i]));                                                \
    return v;                                                                               \
  }
#define MSL_BINARY(name, expr)                                                              \
  MSL_FN float name(float x, float y) { return expr; }                                      \
  template <class T> MSL_FN enable_if_t<is_16bit_float<T>, T> name(T x, T y) {              \
    return T(name((float)x, (float)y));                                                     \
  }                                                                                         \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b) {               \
    MSL_EACH(N) a[i] = T(name((float)a[i], (float)b[i]));                                   \
    return a;                                                                               \
  }
#define MSL_MATH(EXP, EXP10, LOG, LOG2, LOG10, SIN, COS, TAN, POW) \
  MSL_UNARY(exp, EXP(x))                                  \
  MSL_UNARY(exp2, ::exp2f(x))                             \
  MSL_UNARY(exp10, EXP10(x))                              \
  MSL_UNARY(log, LOG(x))                                  \
  MSL_UNARY(log2, LOG2(x))                                \
  MSL_UNARY(log10, LOG10(x))                              \
  MSL_UNARY(sin, SIN(x))                                  \
  MSL_UNARY(cos, COS(x))                                  \
  MSL_UNARY(tan, TAN(x))                                  \
  MSL_BINARY(pow, POW(x, y))                              \
  MSL_BINARY(powr, POW(x, y))                             \
  MSL_UNARY(fabs, ::fabsf(x))                             \
  MSL_UNARY(acos, ::acosf(x))                             \
  MSL_UNARY(acosh, ::acoshf(x))                           \
  MSL_UNARY(asin, ::asinf(x))                             \
  MSL_UNARY(asinh, ::asinhf(x))                           \
  MSL_UNARY(atan, ::atanf(x))                             \
  MSL_UNARY(atanh, ::atanhf(x))                           \
  MSL_UNARY(ceil, ::ceilf(x))                             \
  MSL_UNARY(floor, ::floorf(x))                           \
  MSL_UNARY(round, ::roundf(x))                           \
  MSL_UNARY(rint, ::rintf(x))                             \
  MSL_UNARY(trunc, ::truncf(x))                           \
  MSL_UNARY(cosh, ::coshf(x))                             \
  MSL_UNARY(sinh, ::sinhf(x))                             \
  MSL_UNARY(tanh, ::tanhf(x))                             \
  MSL_UNARY(sqrt, ::sqrtf(x))                             \
  MSL_UNARY(rsqrt, 1.0f / ::sqrtf(x))                     \
  MSL_UNARY(fract, x - ::floorf(x))                       \
  MSL_UNARY(sign, (x > 0 ? 1.0f : x < 0 ? -1.0f : x))     \
  MSL_UNARY(saturate, ::fminf(::fmaxf(x, 0.0f), 1.0f))    \
  MSL_BINARY(fmin, ::fminf(x, y))                         \
  MSL_BINARY(fmax, ::fmaxf(x, y))                         \
  MSL_BINARY(atan2, ::atan2f(x, y))                       \
  MSL_BINARY(fmod, ::fmodf(x, y))                         \
  MSL_BINARY(copysign, ::copysignf(x, y))                 \
  MSL_BINARY(divide, x / y)                               \
  MSL_BINARY(step, y < x ? 0.0f : 1.0f)
MSL_MATH(::expf, ::exp10f, ::logf, ::log2f, ::log10f, ::sinf, ::cosf, ::tanf, ::powf)
namespace fast {
MSL_MATH(::__expf, ::__exp10f, ::__logf, ::__log2f, ::__log10f, ::__sinf, ::__cosf, ::__tanf, ::__powf)
}
namespace precise {
MSL_MATH(::expf, ::exp10f, ::logf, ::log2f, ::log10f, ::sinf, ::cosf, ::tanf, ::powf)
}

#define MSL_FLOAT_FUNCTIONS(T)                                                              \
  MSL_FN T min(T x, T y) { return T(::fminf((float)x, (float)y)); }                         \
  MSL_FN T max(T x, T y) { return T(::fmaxf((float)x, (float)y)); }                         \
  MSL_FN T min3(T x, T y, T z) { return min(x, min(y, z)); }                                \
  MSL_FN T max3(T x, T y, T z) { return max(x, max(y, z)); }                                \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                     \
  MSL_FN T abs(T x) { return T(::fabsf((float)x)); }                                        \
  MSL_FN T fma(T a, T b, T c) { return T(::fmaf((float)a, (float)b, (float)c)); }           \
  MSL_FN T mix(T a, T b, T t) { return a + (b - a) * t; }                                   \
  MSL_FN T ldexp(T x, int k) { return T(::ldexpf((float)x, k)); }                           \
  MSL_FN bool isnan(T x) { return (float)x != (float)x; }                                   \
  MSL_FN bool isinf(T x) { return ::fabsf((float)x) == INFINITY; }                          \
  MSL_FN bool isfinite(T x) { return ::fabsf((float)x) < INFINITY; }                        \
  MSL_FN bool signbit(T x) { return __float_as_int((float)x) < 0; }
MSL_FLOAT_FUNCTIONS(float)
MSL_FLOAT_FUNCTIONS(half)
MSL_FLOAT_FUNCTIONS(bfloat)
#define MSL_SAME_FUNCTIONS \
  using msl::min;          \
  using msl::max;          \
  using msl::min3;         \
  using msl::max3;         \
  using msl::clamp;        \
  using msl::abs;          \
  using msl::fma;          \
  using msl::mix;          \
  using msl::ldexp;        \
  using msl::isnan;        \
  using msl::isinf;        \
  using msl::isfinite;     \
  using msl::signbit;
namespace fast { MSL_SAME_FUNCTIONS }
namespace precise { MSL_SAME_FUNCTIONS }

#include "common_integers.cuh"

#define MSL_BY_ELEMENT(name)                                                         \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b) {        \
    MSL_EACH(N) a[i] = name(a[i], b[i]);                                             \
    return a;                                                                        \
  }                                                                                  \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> a, msl_same<T> b) {      \
    MSL_EACH(N) a[i] = name(a[i], b);                                                \
    return a;                                                                        \
  }
MSL_BY_ELEMENT(min)
MSL_BY_ELEMENT(max)
template <class T, int N> MSL_FN vec<T, N> abs(vec<T, N> a) {
  MSL_EACH(N) a[i] = abs(a[i]);
  return a;
}
template <class T, int N> MSL_FN vec<T, N> clamp(vec<T, N> a, msl_same<T> low, msl_same<T> high) {
  MSL_EACH(N) a[i] = clamp(a[i], low, high);
  return a;
}
template <class T, int N> MSL_FN vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  MSL_EACH(N) a[i] = fma(a[i], b[i], c[i]);
  return a;
}
template <class T, int N> MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  _Pragma("unroll") for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}
template <class T, int N> MSL_FN T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <int N> MSL_FN bool any(vec<bool, N> v) {
  bool r = false;
  MSL_EACH(N) r = r || v[i];
  return r;
}
template <int N> MSL_FN bool all(vec<bool, N> v) {
  bool r = true;
  MSL_EACH(N) r = r && v[i];
  return r;
}
MSL_FN bool any(bool b) { return b; }
MSL_FN bool all(bool b) { return b; }
template <class T> MSL_FN constexpr T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  MSL_EACH(N) a[i] = c[i] ? b[i] : a[i];
  return a;
}

MSL_FN int clz(int x) { return ::__clz(x); }
MSL_FN uint clz(uint x) { return (uint)::__clz((int)x); }
MSL_FN ulong clz(ulong x) { return (ulong)::__clzll((long long)x); }
MSL_FN uint ctz(uint x) { return x ? (uint)::__ffs((int)x) - 1 : 32; }
MSL_FN int ctz(int x) { return (int)ctz((uint)x); }
MSL_FN uint popcount(uint x) { return (uint)::__popc(x); }
MSL_FN int popcount(int x) { return ::__popc((uint)x); }
MSL_FN ulong popcount(ulong x) { return (ulong)::__popcll(x); }
MSL_FN uint reverse_bits(uint x) { return ::__brev(x); }
MSL_FN uint mulhi(uint a, uint b) { return ::__umulhi(a, b); }
MSL_FN int mulhi(int a, int b) { return ::__mulhi(a, b); }
MSL_FN uint rotate(uint v, uint by) { return ::__funnelshift_l(v, v, by); }
MSL_FN float sincos(float x, float& cosine) {
  cosine = ::cosf(x);
  return ::sinf(x);
}
template <class T> MSL_FN void swap(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}

}  // namespace msl
