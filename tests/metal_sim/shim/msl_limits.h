// Constants and <metal_limits>.
#pragma once

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define CHAR_BIT 8
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN10_F 2.30258509299404568402f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {

template <class T> struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, LOW, HIGH)              \
  template <> struct numeric_limits<T> {              \
    static constexpr T max() { return HIGH; }         \
    static constexpr T min() { return LOW; }          \
    static constexpr T lowest() { return LOW; }       \
    static constexpr constant bool is_integer = true; \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(signed char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, -0x7fffffffffffffffL - 1, 0x7fffffffffffffffL)
MSL_INTEGER_LIMITS(ulong, 0, 0xffffffffffffffffUL)
#undef MSL_INTEGER_LIMITS

#define MSL_FLOAT_LIMITS(T, LARGEST, SMALLEST, EPSILON, DIGITS)    \
  template <> struct numeric_limits<T> {                           \
    static constexpr T max() { return (T)LARGEST; }                \
    static constexpr T min() { return (T)SMALLEST; }               \
    static constexpr T lowest() { return (T)-LARGEST; }            \
    static constexpr T infinity() { return (T)__builtin_inff(); }  \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr T epsilon() { return (T)EPSILON; }            \
    static constexpr constant bool is_integer = false;             \
    static constexpr constant int digits = DIGITS;                 \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, 7.8125e-03f, 8)
#undef MSL_FLOAT_LIMITS

}  // namespace metal
