// One row times one vector, for a few tokens; needs codes.metal before it.
//
// A lane takes blocks of STEP consecutive values: 16 bytes of weights where BITS is a power of two, and neighbouring lanes
// neighbouring blocks, so that an access of a SIMD-group uses whole lines of memory. Scales and biases of a threadgroup's
// rows lie one behind the other: threads fetch them once, in words next to each other, for all lanes that want them.
//
// Affine codes of 4 and 8 bits are multiplied as they are, scale and bias once for all STEP. With c in the middle of the
// codes,
//   sum_i x_i (scale q_i + bias) = scale (sum_i x_i q_i - c sum_i x_i) + (bias + c scale) sum_i x_i
// loses no more to rounding than the weights themselves would, since bias is about -c scale. Codes are masked in place
// instead of shifted down: `make_block` divides x by the powers of two, exactly and once for all rows. Other widths are
// dequantized value by value.
template <int MODE, int BITS>
METAL_FUNC constexpr bool sums_codes() {
  return MODE == 1 && (BITS == 4 || BITS == 8);
}
METAL_FUNC float sum4(thread const float* v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// STEP values of x for `block_dot`: x as it wants them, -c times four partial sums of x, and the sum of x.
template <int STEP>
struct XBlock {
  float x[STEP], start[4], total;
};

// Of values of type X in words; zeros where the row has ended.
template <int MODE, int BITS, int STEP, typename X>
METAL_FUNC XBlock<STEP> make_block(thread const uint* words, bool is_inside) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  XBlock<STEP> block;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    block.x[i] = is_inside ? code<0, sizeof(X) * 8, X>(words, i) : 0.0f;
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

template <int NW>
METAL_FUNC void load_shared(const threadgroup uint* from, thread uint* words) {
  if constexpr (NW % 4 == 0) {
#pragma unroll
    for (int i = 0; i < NW / 4; i++) {
      const uint4 v = ((const threadgroup uint4*)from)[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NW; i++) words[i] = from[i];
  }
}

// Where value v of a row in threadgroup memory lies: packs of CHUNK values of each block next to the block's neighbour's, which
// the neighbouring lane reads at the same time, from other banks.
template <int STEP, int CHUNK, int BLOCKS>
METAL_FUNC int chunked(int v) {
  return (v % STEP / CHUNK * BLOCKS + v / STEP) * CHUNK + v % CHUNK;
}

// Block `block` of a `chunked` row of type X in threadgroup memory.
template <int MODE, int BITS, int STEP, int CHUNK, int BLOCKS, typename X>
METAL_FUNC XBlock<STEP> shared_x(const threadgroup uint4* row, int block, bool is_inside) {
  constexpr int WORDS = CHUNK * sizeof(X) / 4;
  uint words[STEP * sizeof(X) / 4];
#pragma unroll
  for (int i = 0; i < STEP / CHUNK; i++) {
    load_shared<WORDS>((const threadgroup uint*)row + (i * BLOCKS + block) * WORDS, words + i * WORDS);
  }
  return make_block<MODE, BITS, STEP, X>(words, is_inside);
}

// sum_i x_i W[row, i] over a block of the row, whose weights are in `words`.
template <int MODE, int BITS, int STEP, typename W>
METAL_FUNC float block_dot(thread const uint* words, float scale, float bias, thread const XBlock<STEP>& block) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  float parts[4];
#pragma unroll
  for (int i = 0; i < 4; i++) parts[i] = block.start[i];
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    if constexpr (sums_codes<MODE, BITS>()) {
      parts[i % 4] += block.x[i] * float(words[i * BITS / 32] & (((1u << BITS) - 1u) << (i * BITS % 32)));
    } else {
      const float q = code<MODE, BITS, W>(words, i);
      parts[i % 4] += block.x[i] * (MODE == 1 ? scale * q + bias : q);
    }
  }
  if constexpr (sums_codes<MODE, BITS>()) return scale * sum4(parts) + (bias + CENTRE * scale) * block.total;
  return MODE == 2 ? scale * sum4(parts) : sum4(parts);
}

// The same of row `row` of scales and biases in threadgroup memory.
template <int MODE, int BITS, int GROUP, int K, int STEP, typename W, typename S>
METAL_FUNC float row_dot(thread const uint* words, const threadgroup S* scales, const threadgroup S* biases, uint row,
                         int block, thread const XBlock<STEP>& x) {
  const uint group = row * (K / GROUP) + block * STEP / GROUP;
  float scale = 1.0f, bias = 0.0f;
  if constexpr (MODE != 0) scale = load_scale<MODE, BITS>(scales, group);
  if constexpr (MODE == 1) bias = float(biases[group]);
  return block_dot<MODE, BITS, STEP, W>(words, scale, bias, x);
}

// Adds to dots [ROWS, TOKENS] the products of a block of ROWS rows with as many tokens of type X, `chunked` rows of K in
// threadgroup memory. Each weight is unpacked once, less the middle of the codes where scale and bias come in once a block.
template <int MODE, int BITS, int GROUP, int K, int STEP, int CHUNK, int ROWS, int TOKENS, typename W, typename X,
          typename S>
METAL_FUNC void rows_dot(thread const uint* words, int apart, const threadgroup S* scales, const threadgroup S* biases,
                         uint first, int block, const threadgroup uint* x, thread float* dots) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  constexpr int X_WORDS = CHUNK * sizeof(X) / 4;
  float sums[ROWS * TOKENS], totals[TOKENS], scale[ROWS], bias[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint group = (first + r) * (K / GROUP) + block * STEP / GROUP;
    scale[r] = 1.0f;
    bias[r] = 0.0f;
    if constexpr (MODE != 0) scale[r] = load_scale<MODE, BITS>(scales, group);
    if constexpr (MODE == 1) bias[r] = float(biases[group]);
  }
#pragma unroll
  for (int n = 0; n < ROWS * TOKENS; n++) sums[n] = 0;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) totals[t] = 0;
#pragma unroll
  for (int from = 0; from < STEP; from += CHUNK) {
    float values[TOKENS * CHUNK];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      uint packed[X_WORDS];
      load_shared<X_WORDS>(x + (t * K + (from / CHUNK * (K / STEP) + block) * CHUNK) * sizeof(X) / 4, packed);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        values[t * CHUNK + i] = code<0, sizeof(X) * 8, X>(packed, i);
        totals[t] += values[t * CHUNK + i];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        const int at = from + i, shift = at * BITS % 32;
        float weight;
        if constexpr (sums_codes<MODE, BITS>()) {
          weight = float(words[r * apart + at * BITS / 32] & (((1u << BITS) - 1u) << shift));
          weight = weight * (1.0f / float(1u << shift)) - CENTRE;
        } else {
          weight = code<MODE, BITS, W>(words + r * apart, at);
          if (MODE == 1) weight = scale[r] * weight + bias[r];
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums[r * TOKENS + t] += weight * values[t * CHUNK + i];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < ROWS * TOKENS; n++) {
    const int r = n / TOKENS;
    float sum = sums[n];
    if (sums_codes<MODE, BITS>()) {
      sum = scale[r] * sum + (bias[r] + CENTRE * scale[r]) * totals[n % TOKENS];
    } else if (MODE == 2) {
      sum = scale[r] * sum;
    }
    dots[n] += sum;
  }
}

// Word i of the scales or biases of ROWS rows of PER_ROW from `first` on: read as one, if all rows together have whole ones.
// What would lie behind the last of `rows` rows is the last of all.
template <int ROWS, int PER_ROW, bool IN_WORDS, typename S>
METAL_FUNC uint factor_word(const device S* from, uint first, uint rows, int i) {
  constexpr int EACH = 4 / sizeof(S);
  const uint start = first * PER_ROW, end = rows * PER_ROW;
  if constexpr (EACH == 1 || (IN_WORDS && ROWS * PER_ROW % EACH == 0)) {
    return ((const device uint*)from)[metal::min(start / EACH + i, end / EACH - 1)];
  } else {
    vec<S, EACH> word;
#pragma unroll
    for (int e = 0; e < EACH; e++) word[e] = from[metal::min(start + i * EACH + e, end - 1)];
    return as_type<uint>(word);
  }
}

// All of them, into threadgroup memory, by THREADS threads.
template <int ROWS, int PER_ROW, int THREADS, bool IN_WORDS, typename S>
METAL_FUNC void share_factors(const device S* from, uint first, uint rows, int index, threadgroup uint* to) {
  constexpr int EACH = 4 / sizeof(S);
  for (int i = index; i < (ROWS * PER_ROW + EACH - 1) / EACH; i += THREADS) {
    to[i] = factor_word<ROWS, PER_ROW, IN_WORDS>(from, first, rows, i);
  }
}

// Words that those take.
template <int MODE, int ROWS, int PER_ROW, typename S>
METAL_FUNC constexpr int factor_words() {
  return MODE == 0 ? 1 : (ROWS * PER_ROW * int(sizeof(S)) + 3) / 4;
}

// Where value v of a row of K lies for lanes that take STEP values each, LANES lanes at a time: in packs of four of each lane
// next to its neighbour's.
template <int K, int STEP, int LANES>
METAL_FUNC uint interleaved(uint v) {
  const uint block = v / STEP, first = block / LANES * LANES, lanes = metal::min(uint(LANES), K / STEP - first);
  return first * STEP + (v % STEP / 4 * lanes + block - first) * 4 + v % 4;
}

// The sum over each LANES neighbouring lanes, in all of them.
template <int LANES>
METAL_FUNC float lanes_sum(float v) {
  if constexpr (LANES == 32) return simd_sum(v);
#pragma unroll
  for (int by = LANES / 2; by > 0; by /= 2) v += simd_shuffle_xor(v, ushort(by));
  return v;
}

// The place of `wanted` among so many values, or -1; the same in all lanes.
template <typename Pointer>
METAL_FUNC int slot_of(Pointer values, int count, int wanted, int lane) {
  int at = -1;
  for (int j = lane; j < count; j += 32) at = values[j] == wanted ? j : at;
  return simd_max(at);
}
