// The Metal Shading Language and its standard library for clang on Linux.
#pragma once
#include "msl_types.h"

#include "msl_traits.h"

#include "msl_math.h"

#include "msl_simd.h"

#include "msl_atomic.h"

namespace metal {
template <class T, size_t N> struct array {
  T d[N];
  constexpr thread T& operator[](size_t i) { return d[i]; }
  constexpr thread const T& operator[](size_t i) const { return d[i]; }
  constexpr size_t size() const { return N; }
};
template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T x) { return x; }
struct os_log {
  template <class... A> constexpr os_log(A...) {}
#ifdef MSL_ERASE
  template <class... A> void log_debug(A...) const {}
#endif
};
}  // namespace metal

#include "msl_builtins.h"

#include "msl_entry.h"
