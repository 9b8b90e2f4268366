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

template <int MODE, int BITS, typename S>
METAL_FUNC float load_scale(const device S* scales, uint group) {
  if constexpr (MODE == 1) return float(scales[group]);
  return as_type<float>(uint(scales[group]) << 23) * (BITS == 4 ? 16384.0f : 256.0f);
}

// ---- one row times one vector, for decode ----
// A lane takes STEP consecutive values at a time: 16 bytes of weights where BITS is a power of two. Affine codes of 4 and
// 8 bits are multiplied as they are, scale and bias once for all STEP. With c in the middle of the codes,
//   sum_i x_i (scale q_i + bias) = scale (sum_i x_i q_i - c sum_i x_i) + (bias + c scale) sum_i x_i
// loses no more to rounding than the weights themselves would, since bias is about -c scale. Codes are masked in place
// instead of shifted down: `load_x` divides x by the powers of two, exactly and once for all rows. Other widths are
// dequantised value by value.
template <int MODE, int BITS>
METAL_FUNC constexpr bool sums_codes() {
  return MODE == 1 && (BITS == 4 || BITS == 8);
}
METAL_FUNC float sum4(thread const float* v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// STEP values of x for `row_dot`: x as it wants them, -c times four partial sums of x, and the sum of x.
template <int STEP>
struct XBlock {
  float x[STEP], start[4], total;
};
template <int MODE, int BITS, int STEP, typename X>
METAL_FUNC XBlock<STEP> load_x(const device X* from) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  XBlock<STEP> block;
  uint words[STEP * sizeof(X) / 4];
  load_words<STEP * sizeof(X) / 4>((const device uint*)from, words);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    block.x[i] = code<0, sizeof(X) * 8, X>(words, i);
    if (sums_codes<MODE, BITS>()) {
      sums[i % 4] += block.x[i];
      block.x[i] *= 1.0f / float(1u << (i * BITS % 32));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) block.start[i] = -CENTRE * sums[i];
  block.total = sum4(sums);
  return block;
}

// sum_i x_i W[row, i] over block `step` of the row.
template <int MODE, int BITS, int GROUP, int K, int STEP, typename P, typename S>
METAL_FUNC float row_dot(const device P* w, const device S* scales, const device S* biases, uint row, int step,
                         thread const XBlock<STEP>& block) {
  constexpr int WORDS = STEP * BITS / 32;
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  uint words[WORDS];
  load_words<WORDS>((const device uint*)w + row * (K / 32 * BITS) + step * WORDS, words);
  const uint group = row * (K / GROUP) + step * STEP / GROUP;
  float scale = 1.0f, bias = 0.0f, parts[4];
  if constexpr (MODE != 0) scale = load_scale<MODE, BITS>(scales, group);
  if constexpr (MODE == 1) bias = float(biases[group]);
#pragma unroll
  for (int i = 0; i < 4; i++) parts[i] = block.start[i];
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    if constexpr (sums_codes<MODE, BITS>()) {
      parts[i % 4] += block.x[i] * float(words[i * BITS / 32] & (((1u << BITS) - 1u) << (i * BITS % 32)));
    } else {
      const float q = code<MODE, BITS, P>(words, i);
      parts[i % 4] += block.x[i] * (MODE == 1 ? scale * q + bias : q);
    }
  }
  if constexpr (sums_codes<MODE, BITS>()) return scale * sum4(parts) + (bias + CENTRE * scale) * block.total;
  return MODE == 2 ? scale * sum4(parts) : sum4(parts);
}

// The sum over each LANES neighbouring lanes, in all of them.
template <int LANES>
METAL_FUNC float lanes_sum(float v) {
  if constexpr (LANES == 32) return simd_sum(v);
#pragma unroll
  for (int by = LANES / 2; by > 0; by /= 2) v += simd_shuffle_xor(v, ushort(by));
  return v;
}

// silu(gate) * up; the bound keeps exp finite and changes nothing that float can hold.
METAL_FUNC float swiglu(float gate, float up) { return gate / (1.0f + exp(min(-gate, 80.0f))) * up; }
