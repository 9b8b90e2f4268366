// <metal_math>, <metal_integer>, <metal_relational>, <metal_geometric>: half goes through float, vectors by element.
#pragma once

namespace metal {

#define MSL_UNARY(name, expr)                                                 \
  METAL_FUNC float name(float x) { return expr; }                             \
  METAL_FUNC half name(half h) {                                              \
    float x = (float)h;                                                       \
    return (half)(expr);                                                      \
  }                                                                           \
  template <int N> METAL_FUNC vec<float, N> name(vec<float, N> v) {           \
    for (int i = 0; i < N; i++) {                                             \
      float x = v[i];                                                         \
      v[i] = expr;                                                            \
    }                                                                         \
    return v;                                                                 \
  }                                                                           \
  template <int N> METAL_FUNC vec<half, N> name(vec<half, N> v) {             \
    for (int i = 0; i < N; i++) {                                             \
      float x = (float)v[i];                                                  \
      v[i] = (half)(expr);                                                    \
    }                                                                         \
    return v;                                                                 \
  }
#define MSL_BINARY(name, expr)                                                     \
  METAL_FUNC float name(float x, float y) { return expr; }                         \
  METAL_FUNC half name(half a, half b) {                                           \
    float x = (float)a, y = (float)b;                                              \
    return (half)(expr);                                                           \
  }                                                                                \
  template <int N> METAL_FUNC vec<float, N> name(vec<float, N> a, vec<float, N> b) { \
    for (int i = 0; i < N; i++) {                                                  \
      float x = a[i], y = b[i];                                                    \
      a[i] = expr;                                                                 \
    }                                                                              \
    return a;                                                                      \
  }                                                                                \
  template <int N> METAL_FUNC vec<half, N> name(vec<half, N> a, vec<half, N> b) {  \
    for (int i = 0; i < N; i++) {                                                  \
      float x = (float)a[i], y = (float)b[i];                                      \
      a[i] = (half)(expr);                                                         \
    }                                                                              \
    return a;                                                                      \
  }
// Functions of one float that C has under the same name.
#define MSL_C_FUNCTIONS(F) \
  F(fabs) F(acos) F(acosh) F(asin) F(asinh) F(atan) F(atanh) F(ceil) F(floor) F(round) F(rint) F(trunc) \
  F(cos) F(cosh) F(sin) F(sinh) F(tan) F(tanh) F(exp) F(exp2) F(log) F(log2) F(log10) F(sqrt)
#define MSL_C_UNARY(name) MSL_UNARY(name, __builtin_##name##f(x))
#define MSL_MATH                                                        \
  MSL_C_FUNCTIONS(MSL_C_UNARY)                                          \
  MSL_UNARY(cospi, __builtin_cosf(x* M_PI_F))                           \
  MSL_UNARY(sinpi, __builtin_sinf(x* M_PI_F))                           \
  MSL_UNARY(tanpi, __builtin_tanf(x* M_PI_F))                           \
  MSL_UNARY(exp10, __builtin_powf(10.0f, x))                            \
  MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                           \
  MSL_UNARY(fract, x - __builtin_floorf(x))                             \
  MSL_UNARY(sign, (x > 0 ? 1.0f : x < 0 ? -1.0f : x))                   \
  MSL_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))  \
  MSL_BINARY(fmin, __builtin_fminf(x, y))                               \
  MSL_BINARY(fmax, __builtin_fmaxf(x, y))                               \
  MSL_BINARY(pow, __builtin_powf(x, y))                                 \
  MSL_BINARY(powr, __builtin_powf(x, y))                                \
  MSL_BINARY(atan2, __builtin_atan2f(x, y))                             \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                               \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))                       \
  MSL_BINARY(divide, x / y)                                             \
  MSL_BINARY(step, y < x ? 0.0f : 1.0f)
MSL_MATH
namespace fast { MSL_MATH }
namespace precise { MSL_MATH }

#define MSL_FLOAT_FUNCTIONS(T)                                                                       \
  METAL_FUNC T min(T x, T y) { return (T)__builtin_fminf((float)x, (float)y); }                      \
  METAL_FUNC T max(T x, T y) { return (T)__builtin_fmaxf((float)x, (float)y); }                      \
  METAL_FUNC T min3(T x, T y, T z) { return min(x, min(y, z)); }                                     \
  METAL_FUNC T max3(T x, T y, T z) { return max(x, max(y, z)); }                                     \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }                          \
  METAL_FUNC T abs(T x) { return (T)__builtin_fabsf((float)x); }                                     \
  METAL_FUNC T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); }        \
  METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }                                        \
  METAL_FUNC T ldexp(T x, int k) { return (T)__builtin_ldexpf((float)x, k); }                        \
  METAL_FUNC bool isnan(T x) { return x != x; }                                                      \
  METAL_FUNC bool isinf(T x) { return __builtin_isinf((float)x); }                                   \
  METAL_FUNC bool isfinite(T x) { return __builtin_isfinite((float)x); }                             \
  METAL_FUNC bool signbit(T x) { return __builtin_signbit((float)x); }                               \
  METAL_FUNC int ilogb(T x) { return __builtin_ilogbf((float)x); }                                   \
  METAL_FUNC T frexp(T x, thread int& exponent) { return (T)__builtin_frexpf((float)x, &exponent); }
MSL_FLOAT_FUNCTIONS(float)
MSL_FLOAT_FUNCTIONS(half)
namespace fast { MSL_FLOAT_FUNCTIONS(float) MSL_FLOAT_FUNCTIONS(half) }
namespace precise { MSL_FLOAT_FUNCTIONS(float) MSL_FLOAT_FUNCTIONS(half) }

#include "../../../metal_kernels/twin/cuda/common_integers.cuh"

#define MSL_BY_ELEMENT(name)                                                   \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> a, vec<T, N> b) { \
    for (int i = 0; i < N; i++) a[i] = name((T)a[i], (T)b[i]);                 \
    return a;                                                                  \
  }                                                                            \
  template <class T, int N> METAL_FUNC vec<T, N> name(vec<T, N> a, T b) {      \
    for (int i = 0; i < N; i++) a[i] = name((T)a[i], b);                       \
    return a;                                                                  \
  }
MSL_BY_ELEMENT(min)
MSL_BY_ELEMENT(max)
template <class T, int N> METAL_FUNC vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = abs((T)a[i]);
  return a;
}
template <class T, int N> METAL_FUNC vec<T, N> clamp(vec<T, N> a, T low, T high) {
  for (int i = 0; i < N; i++) a[i] = clamp((T)a[i], low, high);
  return a;
}
template <class T, int N> METAL_FUNC vec<T, N> clamp(vec<T, N> a, vec<T, N> low, vec<T, N> high) {
  for (int i = 0; i < N; i++) a[i] = clamp((T)a[i], (T)low[i], (T)high[i]);
  return a;
}
template <class T, int N> METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a[i] = fma((T)a[i], (T)b[i], (T)c[i]);
  return a;
}
template <class T, int N> METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N> METAL_FUNC T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <int N> METAL_FUNC bool any(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (v[i]) return true;
  return false;
}
template <int N> METAL_FUNC bool all(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (!v[i]) return false;
  return true;
}
METAL_FUNC bool any(bool b) { return b; }
METAL_FUNC bool all(bool b) { return b; }
template <class T> METAL_FUNC constexpr enable_if_t<msl_vector<T>::n == 1, T> select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N> METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}

METAL_FUNC int clz(int x) { return x ? __builtin_clz((uint)x) : 32; }
METAL_FUNC uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
METAL_FUNC ulong clz(ulong x) { return x ? __builtin_clzl(x) : 64; }
METAL_FUNC int ctz(int x) { return x ? __builtin_ctz((uint)x) : 32; }
METAL_FUNC uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
METAL_FUNC int popcount(int x) { return __builtin_popcount((uint)x); }
METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC ulong popcount(ulong x) { return __builtin_popcountl(x); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_FUNC uint rotate(uint v, uint by) {
  by &= 31;
  return by ? (v << by) | (v >> (32 - by)) : v;
}
METAL_FUNC float nextafter(float x, float y) { return __builtin_nextafterf(x, y); }
METAL_FUNC float sincos(float x, thread float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
template <class T> METAL_FUNC void swap(thread T& a, thread T& b) {
  T t = a;
  a = b;
  b = t;
}

}  // namespace metal
