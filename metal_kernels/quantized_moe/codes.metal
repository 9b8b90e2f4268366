// Reading MLX's packed matrices. A row of K values is a little-endian stream of BITS each, so 32 values fill BITS words,
// and rows, groups and experts start at whole words. Template arguments of all kernels here:
//   MODE  0: plain floats of type P (BITS 16 or 32); 1: affine, value = scale q + bias;
//         2: mxfp4 and mxfp8, value = 2^(scale - 127) times a 4- or 8-bit float
//   GROUP consecutive values of a row that share a scale
// Everything is computed in float.

// NW words from device memory, in the widest loads that the alignment of NW-word blocks allows.
template <int NW>
METAL_FUNC void load_words(const device uint* from, thread uint* words) {
  if constexpr (NW % 4 == 0) {
#pragma unroll
    for (int i = 0; i < NW / 4; i++) {
      const uint4 v = ((const device uint4*)from)[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else if constexpr (NW % 2 == 0) {
#pragma unroll
    for (int i = 0; i < NW / 2; i++) {
      const uint2 v = ((const device uint2*)from)[i];
      words[2 * i] = v.x;
      words[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NW; i++) words[i] = from[i];
  }
}

// An array of T that starts AT words behind another one's start: one of several that lie in a buffer.
template <typename T, int AT, typename From>
METAL_FUNC const device T* part(const device From* from) {
  return (const device T*)((const device uint*)from + AT);
}

template <typename T>
METAL_FUNC uint pack_pair(float a, float b) {
  return as_type<uint>(vec<T, 2>(T(a), T(b)));
}

// Value i of a block, before scale and bias. The 4- and 8-bit floats have the exponent and mantissa of a half in fewer
// bits: they become halves that are 2^14 and 2^8 too small, which `load_scale` makes up for.
template <int MODE, int BITS, typename P>
METAL_FUNC float code(thread const uint* words, int i) {
  if constexpr (BITS == 32) {
    return as_type<float>(words[i]);
  } else if constexpr (BITS == 16) {
    return float(as_type<P>(ushort(words[i / 2] >> (i % 2 * 16))));
  } else {
    const int word = i * BITS / 32, shift = i * BITS % 32;
    uint q = words[word] >> shift;
    if (shift + BITS > 32) q |= words[word + 1] << (32 - shift);
    q &= (1u << BITS) - 1u;
    if constexpr (MODE == 1) return float(q);
    const uint bits = BITS == 4 ? (q & 8u) << 12 | (q & 7u) << 9 : (q & 128u) << 8 | (q & 127u) << 7;
    return float(as_type<half>(ushort(bits)));
  }
}

template <int MODE, int BITS, typename Scales>
METAL_FUNC float load_scale(Scales scales, uint group) {
  if constexpr (MODE == 1) return float(scales[group]);
  return as_type<float>(uint(scales[group]) << 23) * (BITS == 4 ? 16384.0f : 256.0f);
}

// silu(gate) * up; the bound keeps exp finite and changes nothing that float can hold.
METAL_FUNC float swiglu(float gate, float up) { return gate / (1.0f + exp(min(-gate, 80.0f))) * up; }
