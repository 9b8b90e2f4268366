// Scalars, vectors, address spaces, and how a kernel's source position travels into runtime calls.
#pragma once
#include "../runtime/interface.h"

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_MACOS__ 1

// Address spaces of the language that lower to LLVM address space 0 on x86: the front end checks them and the
// sanitizer passes still see the accesses. Execution builds (MSL_ERASE) drop them, since clang cannot copy structs
// between spaces. In Metal `constant` implies const.
#ifdef MSL_ERASE
#define device
#define threadgroup
#define constant const
#else
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_constant))
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST constant
#define MSL_CONSTEXPR constexpr
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT FLT_MAX
#define HALF_MAX ((half)65504.0f)
#define CHAR_BIT 8
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define MSL_SITE const char *msl_f = __builtin_FILE(), unsigned msl_l = __builtin_LINE()

typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
using ::bfloat;
using ::half;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
#include "../../../metal_kernels/twin/cuda/common_types.cuh"
}  // namespace metal

#define MSL_VECTORS(T)     \
  namespace metal {        \
  typedef vec<T, 2> T##2;  \
  typedef vec<T, 3> T##3;  \
  typedef vec<T, 4> T##4;  \
  }                        \
  using metal::T##2;       \
  using metal::T##3;       \
  using metal::T##4;
MSL_SCALARS(MSL_VECTORS)
#undef MSL_VECTORS

// Packed vectors: the same elements, aligned as one of them.
#define MSL_PACKED(T)                                                            \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
MSL_PACKED(float)
MSL_PACKED(half)
MSL_PACKED(int)
MSL_PACKED(uint)
MSL_PACKED(uchar)
MSL_PACKED(char)
#undef MSL_PACKED

template <class To, class From> inline constexpr To as_type(From x) { return __builtin_bit_cast(To, x); }
namespace metal { using ::as_type; }

// Vector construction: the rewriter turns float4(a, b) into msl_mk<float4>(a, b).
template <class T> struct msl_vector { static constexpr int n = 1; using element = T; };
template <class T> struct msl_vector<metal::vec<T, 2>> { static constexpr int n = 2; using element = T; };
template <class T> struct msl_vector<metal::vec<T, 3>> { static constexpr int n = 3; using element = T; };
template <class T> struct msl_vector<metal::vec<T, 4>> { static constexpr int n = 4; using element = T; };

template <class V, int I> inline constexpr void msl_fill(V&) {
  static_assert(I == msl_vector<V>::n, "too few vector elements");
}
template <class V, int I, class A, class... R> inline constexpr void msl_fill(V& v, A a, R... rest) {
  using element = typename msl_vector<V>::element;
  if constexpr (msl_vector<A>::n == 1) {
    v[I] = (element)a;
  } else {
    for (int i = 0; i < msl_vector<A>::n; i++) v[I + i] = (element)a[i];
  }
  msl_fill<V, I + msl_vector<A>::n>(v, rest...);
}
template <class V> inline constexpr V msl_mk() { return V(0); }
template <class V, class A> inline constexpr V msl_mk(A a) {
  using element = typename msl_vector<V>::element;
  if constexpr (msl_vector<V>::n == 1) {
    return (V)a;
  } else if constexpr (msl_vector<A>::n == 1) {
    return V((element)a);
  } else {
    static_assert(msl_vector<A>::n == msl_vector<V>::n, "vector size");
    V v{};
    for (int i = 0; i < msl_vector<V>::n; i++) v[i] = (element)a[i];
    return v;
  }
}
template <class V, class A, class B, class... R> inline constexpr V msl_mk(A a, B b, R... rest) {
  V v{};
  msl_fill<V, 0>(v, a, b, rest...);
  return v;
}
