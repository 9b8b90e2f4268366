// Scalars, traits and vectors of Metal. Half and bfloat are storage: arithmetic goes through float and rounds once.
#pragma once
#include "ptx.cuh"

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define METAL_FUNC MSL_FN
#define METAL_CONST const
#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define HUGE_VALF INFINITY
#define MSL_CONSTEXPR

namespace msl {

template <class To, class From> MSL_FN To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
  To to;
  memcpy(&to, &x, sizeof(to));
  return to;
}

struct half {
  ushort bits;
  half() = default;
  MSL_FN half(float x) : bits(ptx_half_from_float(x)) {}
  MSL_FN operator float() const { return ptx_float_from_half(bits); }
};
struct bfloat {
  ushort bits;
  bfloat() = default;
  MSL_FN explicit bfloat(float x) : bits(ptx_bfloat_from_float(x)) {}
  MSL_FN operator float() const { return __uint_as_float((uint)bits << 16); }
};
using float16_t = half;
using bfloat16_t = bfloat;

#include "common_types.cuh"
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> { using type = T; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> constexpr bool is_16bit_float = is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> constexpr bool is_floating_point_v = is_16bit_float<T> || is_same_v<T, float>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

#define MSL_16BIT_OPERATOR(op)                                                                     \
  template <class T> MSL_FN enable_if_t<is_16bit_float<T>, T> operator op(T a, T b) {              \
    return T((float)a op(float) b);                                                                \
  }                                                                                                \
  template <class T> MSL_FN enable_if_t<is_16bit_float<T>, T&> operator op##=(T& a, float b) {     \
    return a = T((float)a op b);                                                                   \
  }
MSL_16BIT_OPERATOR(+)
MSL_16BIT_OPERATOR(-)
MSL_16BIT_OPERATOR(*)
MSL_16BIT_OPERATOR(/)
#undef MSL_16BIT_OPERATOR
template <class T> MSL_FN enable_if_t<is_16bit_float<T>, T> operator-(T a) { return T(-(float)a); }

// Vectors: aligned as Metal's, elements by name or index. No swizzles.
template <class T, int N> struct vec;
#define MSL_VECTOR_MEMBERS(N)                                                      \
  using element = T;                                                               \
  vec() = default;                                                                 \
  MSL_FN T& operator[](int i) { return (&x)[i]; }                                  \
  MSL_FN const T& operator[](int i) const { return (&x)[i]; }                      \
  template <class U> MSL_FN explicit vec(vec<U, N> o) {                            \
    _Pragma("unroll") for (int i = 0; i < N; i++)(*this)[i] = T(o[i]);             \
  }
template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  MSL_VECTOR_MEMBERS(2)
  MSL_FN explicit vec(T a) : x(a), y(a) {}
  template <class A, class B> MSL_FN vec(A a, B b) : x(T(a)), y(T(b)) {}
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  MSL_VECTOR_MEMBERS(3)
  MSL_FN explicit vec(T a) : x(a), y(a), z(a) {}
  template <class A, class B, class C> MSL_FN vec(A a, B b, C c) : x(T(a)), y(T(b)), z(T(c)) {}
};
template <class T> struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) vec<T, 4> {
  T x, y, z, w;
  MSL_VECTOR_MEMBERS(4)
  MSL_FN explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  template <class A, class B, class C, class D>
  MSL_FN vec(A a, B b, C c, D d) : x(T(a)), y(T(b)), z(T(c)), w(T(d)) {}
  MSL_FN vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  MSL_FN vec(vec<T, 3> a, T b) : x(a.x), y(a.y), z(a.z), w(b) {}
};
#undef MSL_VECTOR_MEMBERS
#define MSL_VECTORS(T)    \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
MSL_SCALARS(MSL_VECTORS)
#undef MSL_VECTORS

#define MSL_EACH(N) _Pragma("unroll") for (int i = 0; i < N; i++)
template <class T> struct msl_identity { using type = T; };
template <class T> using msl_same = typename msl_identity<T>::type;  // a parameter that deduces nothing
#define MSL_VECTOR_OPERATOR(op)                                                                       \
  template <class T, int N> MSL_FN vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                  \
    MSL_EACH(N) a[i] = T(a[i] op b[i]);                                                               \
    return a;                                                                                         \
  }                                                                                                   \
  template <class T, int N> MSL_FN vec<T, N> operator op(vec<T, N> a, msl_same<T> b) {                \
    MSL_EACH(N) a[i] = T(a[i] op b);                                                                  \
    return a;                                                                                         \
  }                                                                                                   \
  template <class T, int N> MSL_FN vec<T, N> operator op(msl_same<T> b, vec<T, N> a) {                \
    MSL_EACH(N) a[i] = T(b op a[i]);                                                                  \
    return a;                                                                                         \
  }                                                                                                   \
  template <class T, int N> MSL_FN vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) { return a = a op b; } \
  template <class T, int N> MSL_FN vec<T, N>& operator op##=(vec<T, N>& a, msl_same<T> b) { return a = a op b; }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
MSL_VECTOR_OPERATOR(&)
MSL_VECTOR_OPERATOR(|)
MSL_VECTOR_OPERATOR(^)
MSL_VECTOR_OPERATOR(<<)
MSL_VECTOR_OPERATOR(>>)
#undef MSL_VECTOR_OPERATOR
template <class T, int N> MSL_FN vec<T, N> operator-(vec<T, N> a) {
  MSL_EACH(N) a[i] = T(-a[i]);
  return a;
}
#define MSL_VECTOR_COMPARISON(op)                                                     \
  template <class T, int N> MSL_FN vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) { \
    vec<bool, N> r;                                                                   \
    MSL_EACH(N) r[i] = a[i] op b[i];                                                  \
    return r;                                                                         \
  }
MSL_VECTOR_COMPARISON(<)
MSL_VECTOR_COMPARISON(>)
MSL_VECTOR_COMPARISON(<=)
MSL_VECTOR_COMPARISON(>=)
MSL_VECTOR_COMPARISON(==)
MSL_VECTOR_COMPARISON(!=)
#undef MSL_VECTOR_COMPARISON

template <class T, size_t N> struct array {
  T d[N];
  MSL_FN T& operator[](size_t i) { return d[i]; }
  MSL_FN const T& operator[](size_t i) const { return d[i]; }
};

}  // namespace msl
