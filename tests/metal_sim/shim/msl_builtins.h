// The compiler's own builtins that MLX's bf16_math.h calls for bfloat.
#pragma once

#define MSL_BUILTIN1(n, expr) \
  METAL_FUNC float __metal_##n(float x, int) { return expr; }
#define MSL_C_BUILTIN(n) MSL_BUILTIN1(n, __builtin_##n##f(x))
MSL_C_FUNCTIONS(MSL_C_BUILTIN)
MSL_BUILTIN1(cospi, metal::cospi(x))
MSL_BUILTIN1(exp10, metal::exp10(x))
MSL_BUILTIN1(fract, metal::fract(x))
MSL_BUILTIN1(rsqrt, metal::rsqrt(x))
MSL_BUILTIN1(sinpi, metal::sinpi(x))
MSL_BUILTIN1(tanpi, metal::tanpi(x))

#define MSL_BUILTIN2(n, expr) \
  METAL_FUNC float __metal_##n(float x, float y, int = 0) { return expr; }
MSL_BUILTIN2(atan2, __builtin_atan2f(x, y))
MSL_BUILTIN2(divide, x / y)
MSL_BUILTIN2(fmax, __builtin_fmaxf(x, y))
MSL_BUILTIN2(fmin, __builtin_fminf(x, y))
MSL_BUILTIN2(fmod, __builtin_fmodf(x, y))
MSL_BUILTIN2(nextafter, __builtin_nextafterf(x, y))
MSL_BUILTIN2(pow, __builtin_powf(x, y))
MSL_BUILTIN2(powr, __builtin_powf(x, y))

METAL_FUNC float __metal_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC float __metal_fmax3(float a, float b, float c, int) { return metal::max3(a, b, c); }
METAL_FUNC float __metal_fmin3(float a, float b, float c, int) { return metal::min3(a, b, c); }
METAL_FUNC float __metal_fmedian3(float a, float b, float c, int) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
METAL_FUNC float __metal_frexp(float x, int* exponent) { return __builtin_frexpf(x, exponent); }
METAL_FUNC float __metal_ldexp(float x, int k, int) { return __builtin_ldexpf(x, k); }

#define MSL_BUILTIN_SIMD(n) \
  template <class T> METAL_FUNC T __metal_simd_##n(T x, MSL_SITE) { return metal::simd_##n(x, msl_f, msl_l); }
MSL_BUILTIN_SIMD(sum)
MSL_BUILTIN_SIMD(product)
MSL_BUILTIN_SIMD(min)
MSL_BUILTIN_SIMD(max)
MSL_BUILTIN_SIMD(and)
MSL_BUILTIN_SIMD(or)
MSL_BUILTIN_SIMD(xor)
MSL_BUILTIN_SIMD(prefix_inclusive_sum)
MSL_BUILTIN_SIMD(prefix_exclusive_sum)
MSL_BUILTIN_SIMD(prefix_inclusive_product)
MSL_BUILTIN_SIMD(prefix_exclusive_product)

#define MSL_BUILTIN_SHUFFLE(n)                                              \
  template <class T> METAL_FUNC T __metal_simd_##n(T x, ushort a, MSL_SITE) { \
    return metal::simd_##n(x, a, msl_f, msl_l);                             \
  }
MSL_BUILTIN_SHUFFLE(shuffle)
MSL_BUILTIN_SHUFFLE(broadcast)
MSL_BUILTIN_SHUFFLE(shuffle_xor)
MSL_BUILTIN_SHUFFLE(shuffle_up)
MSL_BUILTIN_SHUFFLE(shuffle_down)
MSL_BUILTIN_SHUFFLE(shuffle_rotate_up)
MSL_BUILTIN_SHUFFLE(shuffle_rotate_down)

#define MSL_BUILTIN_FILL(n)                                                                     \
  template <class T> METAL_FUNC T __metal_simd_##n(T x, T fill, ushort by, ushort m, MSL_SITE) { \
    return metal::simd_##n(x, fill, by, m, msl_f, msl_l);                                       \
  }
MSL_BUILTIN_FILL(shuffle_and_fill_up)
MSL_BUILTIN_FILL(shuffle_and_fill_down)

#define __metal_get_thread_index_in_simdgroup(...) ((ushort)msl_self->lane)
#define __metal_get_simdgroup_size(...) ((ushort)32)
