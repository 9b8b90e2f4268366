// <metal_atomic>: relaxed order only, as in Metal. Fibers never interleave inside an operation.
#pragma once

namespace metal {

template <class T> struct atomic { T v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

#define MSL_UNSEEN __attribute__((no_sanitize("thread"), noinline))
template <class T> MSL_UNSEEN T msl_atomic_load(void* p) { return *(T*)p; }
template <class T> MSL_UNSEEN void msl_atomic_store(void* p, T x) { *(T*)p = x; }

#define MSL_ATOMIC_UPDATE(SPACE, op, expr)                                                                     \
  template <class T>                                                                                           \
  METAL_FUNC T atomic_fetch_##op##_explicit(volatile SPACE atomic<T>* o, type_identity_t<T> x, memory_order) { \
    msl_atomic_access((const void*)o, sizeof(T), 1);                                                           \
    T r = msl_atomic_load<T>((void*)o);                                                                        \
    msl_atomic_store<T>((void*)o, expr);                                                                       \
    return r;                                                                                                  \
  }
#define MSL_ATOMICS(SPACE)                                                                                    \
  template <class T> METAL_FUNC T atomic_load_explicit(const volatile SPACE atomic<T>* o, memory_order) {     \
    msl_atomic_access((const void*)o, sizeof(T), 0);                                                          \
    return msl_atomic_load<T>((void*)o);                                                                      \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL_FUNC void atomic_store_explicit(volatile SPACE atomic<T>* o, type_identity_t<T> x, memory_order) {    \
    msl_atomic_access((const void*)o, sizeof(T), 1);                                                          \
    msl_atomic_store<T>((void*)o, x);                                                                         \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL_FUNC T atomic_exchange_explicit(volatile SPACE atomic<T>* o, type_identity_t<T> x, memory_order) {    \
    msl_atomic_access((const void*)o, sizeof(T), 1);                                                          \
    T r = msl_atomic_load<T>((void*)o);                                                                       \
    msl_atomic_store<T>((void*)o, x);                                                                         \
    return r;                                                                                                 \
  }                                                                                                           \
  template <class T>                                                                                          \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* o, thread T* expected,      \
                                                        type_identity_t<T> x, memory_order, memory_order) {   \
    msl_atomic_access((const void*)o, sizeof(T), 1);                                                          \
    T r = msl_atomic_load<T>((void*)o);                                                                       \
    if (__builtin_memcmp(&r, expected, sizeof(T)) == 0) {                                                     \
      msl_atomic_store<T>((void*)o, x);                                                                       \
      return true;                                                                                            \
    }                                                                                                         \
    *expected = r;                                                                                            \
    return false;                                                                                             \
  }                                                                                                           \
  MSL_ATOMIC_UPDATE(SPACE, add, r + x)                                                                        \
  MSL_ATOMIC_UPDATE(SPACE, sub, r - x)                                                                        \
  MSL_ATOMIC_UPDATE(SPACE, min, (x < r ? x : r))                                                              \
  MSL_ATOMIC_UPDATE(SPACE, max, (r < x ? x : r))                                                              \
  MSL_ATOMIC_UPDATE(SPACE, and, r & x)                                                                        \
  MSL_ATOMIC_UPDATE(SPACE, or, r | x)                                                                         \
  MSL_ATOMIC_UPDATE(SPACE, xor, r ^ x)
MSL_ATOMICS(device)
#ifndef MSL_ERASE
MSL_ATOMICS(threadgroup)
#endif
#undef MSL_ATOMICS

}  // namespace metal
