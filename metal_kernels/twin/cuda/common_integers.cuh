// <metal_integer>, what is the same on a GPU and in the simulator of the tests; included inside the namespace.
#define MSL_INTEGER_FUNCTIONS(T)                                           \
  METAL_FUNC constexpr T min(T x, T y) { return y < x ? y : x; }           \
  METAL_FUNC constexpr T max(T x, T y) { return x < y ? y : x; }           \
  METAL_FUNC constexpr T min3(T x, T y, T z) { return min(x, min(y, z)); } \
  METAL_FUNC constexpr T max3(T x, T y, T z) { return max(x, max(y, z)); } \
  METAL_FUNC constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
#define MSL_SIGNED_FUNCTIONS(T) \
  MSL_INTEGER_FUNCTIONS(T)      \
  METAL_FUNC T abs(T x) { return x < 0 ? -x : x; }
#define MSL_UNSIGNED_FUNCTIONS(T) \
  MSL_INTEGER_FUNCTIONS(T)        \
  METAL_FUNC T abs(T x) { return x; }
MSL_SIGNED_FUNCTIONS(int)
MSL_SIGNED_FUNCTIONS(short)
MSL_SIGNED_FUNCTIONS(char)
MSL_SIGNED_FUNCTIONS(signed char)
MSL_SIGNED_FUNCTIONS(long)
MSL_UNSIGNED_FUNCTIONS(uint)
MSL_UNSIGNED_FUNCTIONS(ushort)
MSL_UNSIGNED_FUNCTIONS(uchar)
MSL_UNSIGNED_FUNCTIONS(ulong)
