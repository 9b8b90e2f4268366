// Constants, traits and limits of Metal. Included inside the namespace, here and by the simulator of the tests; either
// defines METAL_FUNC, MSL_CONSTEXPR (for a function that may return half or bfloat), INFINITY and NAN first.
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN10_F 2.30258509299404568402f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
// The types that have vectors.
#define MSL_SCALARS(F) \
  F(float) F(half) F(bfloat) F(int) F(uint) F(short) F(ushort) F(char) F(uchar) F(long) F(ulong) F(bool)

template <class T, T V> struct integral_constant {
  using value_type = T;
  using type = integral_constant;
  static constexpr T value = V;
  METAL_FUNC constexpr operator T() const { return V; }
  METAL_FUNC constexpr T operator()() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, LOW, HIGH)                   \
  template <> struct numeric_limits<T> {                   \
    METAL_FUNC static constexpr T max() { return HIGH; }   \
    METAL_FUNC static constexpr T min() { return LOW; }    \
    METAL_FUNC static constexpr T lowest() { return LOW; } \
    static constexpr bool is_integer = true;               \
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
#define MSL_FLOAT_LIMITS(T, LARGEST, SMALLEST, EPSILON, DIGITS)              \
  template <> struct numeric_limits<T> {                                     \
    METAL_FUNC static MSL_CONSTEXPR T max() { return T(LARGEST); }           \
    METAL_FUNC static MSL_CONSTEXPR T min() { return T(SMALLEST); }          \
    METAL_FUNC static MSL_CONSTEXPR T lowest() { return T(-LARGEST); }       \
    METAL_FUNC static MSL_CONSTEXPR T infinity() { return T(INFINITY); }     \
    METAL_FUNC static MSL_CONSTEXPR T quiet_NaN() { return T(NAN); }         \
    METAL_FUNC static MSL_CONSTEXPR T epsilon() { return T(EPSILON); }       \
    static constexpr bool is_integer = false;                                \
    static constexpr int digits = DIGITS;                                    \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, 7.8125e-03f, 8)
#undef MSL_FLOAT_LIMITS
