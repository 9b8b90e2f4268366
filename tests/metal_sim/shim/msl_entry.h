// What generated code calls: threadgroup variables, and the entry that hands a kernel its arguments.
#pragma once

template <class T> METAL_FUNC threadgroup T& msl_tg(unsigned id, const char* name, bool zero = false) {
  return *(threadgroup T*)msl_tg_alloc(id, sizeof(T), alignof(T), name, zero);
}

// Raw arguments: a buffer, three numbers, one number. Each converts to the type of the parameter it meets.
struct msl_buf { void* p; };
struct msl_a3 {
  unsigned v[3];
  template <class T, int N> operator metal::vec<T, N>() const {
    metal::vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = (T)v[i];
    return r;
  }
  operator uint() const { return v[0]; }
  operator ushort() const { return (ushort)v[0]; }
};
struct msl_a1 {
  unsigned v;
  template <class T> operator T() const { return (T)v; }
};
METAL_FUNC msl_a3 msl_attr3(const unsigned* v) { return msl_a3{{v[0], v[1], v[2]}}; }
METAL_FUNC msl_a1 msl_attr1(unsigned v) { return msl_a1{v}; }

template <class P> struct msl_arg {
  static P get(msl_buf b) { return (P)b.p; }
  static P get(msl_a3 a) { return static_cast<P>(a); }
  static P get(msl_a1 a) { return static_cast<P>(a.v); }
};
template <class T> struct msl_arg<T&> {
  static T& get(msl_buf b) { return *(T*)b.p; }
};
template <class... P, class... A> METAL_FUNC void msl_call(void (*f)(P...), A... a) { f(msl_arg<P>::get(a)...); }
