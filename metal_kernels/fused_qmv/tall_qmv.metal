// Products of 1 to 8 tokens with one or two packed matrices, with what stands before and after, on simdgroup matrices.
//
//   PROLOGUE 0: a = x;  1: a = weight * x / sqrt(mean(x^2) + eps);  2: a = linear_gate(x, gate) over GROUPS groups
//   first = residual + a first_w^T,  second = a second_w^T
//
// Layout        x, gate [TOKENS, K]; weight [K]; first_w [N, K], second_w [SECOND, K] packed alike;
//               residual, first [TOKENS, N]; second [TOKENS, SECOND]
// Grid          x: rows of first_w, then of second_w; a threadgroup owns TILES tiles of 16, one after the other.
// Threadgroup   SIMDGROUPS simdgroups share out K in units of UNIT values: each keeps its OWN units of all tokens as tiles of M
//               for good, and streams the same units of all rows past them. Sums of a tile meet in threadgroup memory.
// Requires      UNIT 32 or 64, a divisor of K / GROUPS and of GROUP; the UNIT / 4 values of a lane fill whole words.
// Computes      a is rounded to O, in the norm by way of T as MLX does, and is exact in M. So are codes, and sums are of
//               float: scale and bias come in once a unit, with the unit's sum of a. y rounds once, to Y.
//               Threadgroup memory: the larger of 8 UNIT sizeof(M) and 1 KB a simdgroup, 32 bytes a simdgroup or, of groups, a unit, and the scales
//               and biases of 32 rows. Weights of AHEAD tiles are under way.
//
// A lane holds two adjacent columns of one row of an 8 x 8 tile, so four lanes have a row: its `pair` says which columns. Of a
// unit of its row a lane reads a quarter. Which value stands in which column is free where both operands agree: in place of
// neighbours, a pair of columns has two codes that one mask takes out of a word. Lanes are in Apple's order, on which MLX's
// own products rely, or in MSL_TENSOR_CORE_LAYOUT. Tiles start at even elements: MSL_EVEN_PAIRS.
METAL_FUNC int lane_of(int row, int pair) {
#ifdef MSL_TENSOR_CORE_LAYOUT
  return row * 4 + pair;
#else
  return ((row & 4) | (pair & 2)) * 4 + (row & 3) * 2 + (pair & 1);
#endif
}
METAL_FUNC int row_of(int lane) {
#ifdef MSL_TENSOR_CORE_LAYOUT
  return lane / 4;
#else
  return (lane / 4 & 4) + lane / 2 % 4;
#endif
}
METAL_FUNC int pair_of(int lane) {
#ifdef MSL_TENSOR_CORE_LAYOUT
  return lane % 4;
#else
  return (lane / 4 & 2) + lane % 2;
#endif
}
// The sum over the four lanes of a row, in all of them.
METAL_FUNC float row_sum(float v, int row, int pair) {
  v += simd_shuffle(v, ushort(lane_of(row, pair ^ 1)));
  return v + simd_shuffle(v, ushort(lane_of(row, pair ^ 2)));
}

// 4-bit codes become 16-bit floats from 16 to 31 by setting bits: the code is the upper part of the mantissa.
template <int MODE, int BITS, typename M>
METAL_FUNC constexpr bool sets_bits() {
  return MODE == 1 && BITS == 4 && sizeof(M) == 2;
}
// What the tiles have is the code less this.
template <int MODE, int BITS, typename M>
METAL_FUNC constexpr float code_offset() {
  return MODE != 1 ? 0.0f : sets_bits<MODE, BITS, M>() ? -16.0f : float(1 << (BITS - 1));
}
// How far the two codes of a pair lie apart.
template <int MODE, int BITS>
METAL_FUNC constexpr int gap() {
  return MODE == 1 && 32 % BITS == 0 ? 16 / BITS : 1;
}
// The first code of pair m.
template <int MODE, int BITS>
METAL_FUNC int first_of(int m) {
  constexpr int GAP = gap<MODE, BITS>();
  return m / GAP * 2 * GAP + m % GAP;
}
template <int MODE, int BITS, typename M, typename W>
METAL_FUNC vec<M, 2> code_pair(thread const uint* words, int m) {
  if constexpr (sets_bits<MODE, BITS, M>()) {
    constexpr int TO = is_same_v<M, half> ? 6 : 3;
    constexpr uint MASK = 0x000f000fu << TO, SIXTEEN = is_same_v<M, half> ? 0x4c004c00u : 0x41804180u;
    const int by = m % 4 * 4 - TO;
    const uint moved = by < 0 ? words[m / 4] << metal::max(-by, 0) : words[m / 4] >> metal::max(by, 0);
    return as_type<vec<M, 2>>((moved & MASK) | SIXTEEN);
  } else {
    const int at = first_of<MODE, BITS>(m);
    const float offset = code_offset<MODE, BITS, M>();
    return vec<M, 2>(M(code<MODE, BITS, W>(words, at) - offset),
                     M(code<MODE, BITS, W>(words, at + gap<MODE, BITS>()) - offset));
  }
}

// A lane's words of the 16 rows from `first` on: of row `row` and of the one 8 below it. What would lie behind the last row or
// unit is the last one's.
template <int BITS, int K, int UNIT, int OWN, typename W>
METAL_FUNC void load_rows(const device W* w, uint first, uint rows, int unit, int row, int pair, thread uint* words) {
  constexpr int WORDS = UNIT / 4 * BITS / 32, UNITS = K / UNIT;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint r = metal::min(first + uint(i * 8 + row), rows - 1);
#pragma unroll
    for (int u = 0; u < OWN; u++) {
      const int at = metal::min(unit + u, UNITS - 1);
      load_words<WORDS>((const device uint*)w + r * (K / 32 * BITS) + at * (UNIT / 32 * BITS) + pair * WORDS,
                        words + (i * OWN + u) * WORDS);
    }
  }
}

// A thread's words of the scales or biases of the 16 rows from `first` on.
template <int PER_ROW, int THREADS, bool IN_WORDS, typename S>
METAL_FUNC void load_factors(const device S* from, uint first, uint rows, int index, thread uint* words) {
  constexpr int COUNT = 16 * PER_ROW * sizeof(S) / 4;
#pragma unroll
  for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; i++) {
    words[i] = factor_word<16, PER_ROW, IN_WORDS>(from, first, rows, metal::min(i * THREADS + index, COUNT - 1));
  }
}
// Bytes from a row of them in threadgroup memory to the next: one word more than it has, so that rows lie in other banks.
template <int PER_ROW, typename S>
METAL_FUNC constexpr int factor_pitch() {
  return PER_ROW * sizeof(S) % 4 == 0 ? PER_ROW * int(sizeof(S)) + 4 : PER_ROW * int(sizeof(S));
}
template <int PER_ROW, int THREADS, typename S>
METAL_FUNC void store_factors(thread const uint* words, int index, threadgroup uint* to) {
  constexpr int COUNT = 16 * PER_ROW * sizeof(S) / 4, A_ROW = PER_ROW * sizeof(S) / 4;
  constexpr bool IS_PADDED = PER_ROW * sizeof(S) % 4 == 0;
#pragma unroll
  for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; i++) {
    const int at = i * THREADS + index;
    if (at < COUNT) to[IS_PADDED ? at + at / metal::max(A_ROW, 1) : at] = words[i];
  }
}

// ---- kernel ----
constexpr int UNITS = K / UNIT, OWN = (UNITS + SIMDGROUPS - 1) / SIMDGROUPS, THREADS = SIMDGROUPS * 32;
constexpr int EACH = UNIT / 4, PAIRS = EACH / 2, GAP = gap<MODE, BITS>(), WORDS = EACH * BITS / 32;
constexpr int STAGED = 8 * UNIT * sizeof(M), SUMS = 2 * 128 * sizeof(float), BYTES = STAGED > SUMS ? STAGED : SUMS;
constexpr int PER_ROW = K / GROUP, PITCH = factor_pitch<PER_ROW, S>(), FACTORS = 16 * PITCH / 4;
constexpr int A_THREAD = (16 * PER_ROW * sizeof(S) / 4 + THREADS - 1) / THREADS;
constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0 && SECOND * PER_ROW * sizeof(S) % 4 == 0;
constexpr int SQUARES = GROUPS > 1 ? UNITS : SIMDGROUPS, PARTS = SQUARES / GROUPS, FIRST = (N + TILES * 16 - 1) / (TILES * 16);
const int simd = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup, index = thread_index_in_threadgroup;
const int row = row_of(lane), pair = pair_of(lane), unit = simd * OWN;
const uint place = threadgroup_position_in_grid.x;
const bool is_second = SECOND > 0 && place >= FIRST;
const uint rows = is_second ? SECOND : N, begin = (is_second ? place - FIRST : place) * TILES * 16;
const auto w = is_second ? second_w : first_w;
const auto s = is_second ? second_s : first_s;
const auto b = is_second ? second_b : first_b;
threadgroup uint4 memory[SIMDGROUPS * BYTES / 16];
threadgroup float squares[SQUARES * 8];

threadgroup uint scales[MODE == 0 ? 1 : 2 * FACTORS], biases[MODE == 1 ? 2 * FACTORS : 1];  // of a tile and the next one

uint words[AHEAD * 2 * OWN * WORDS], scale_words[AHEAD * A_THREAD], bias_words[AHEAD * A_THREAD];
#pragma unroll
for (int a = 0; a < AHEAD; a++) {
  load_rows<BITS, K, UNIT, OWN>(w, begin + a * 16, rows, unit, row, pair, words + a * 2 * OWN * WORDS);
  if constexpr (MODE != 0) load_factors<PER_ROW, THREADS, IN_WORDS>(s, begin + a * 16, rows, index, scale_words + a * A_THREAD);
  if constexpr (MODE == 1) load_factors<PER_ROW, THREADS, IN_WORDS>(b, begin + a * 16, rows, index, bias_words + a * A_THREAD);
}

// Behind the first weights, which are under way meanwhile: the norm. Lanes of row t have token t, and the same quarter of a unit.
if constexpr (PROLOGUE > 0) {
  float square = 0;
#pragma unroll
  for (int u = 0; u < OWN; u++) {
    if (row < TOKENS && unit + u < UNITS) {
      float v[EACH];
      load_pack<EACH>(x + row * K + (unit + u) * UNIT + pair * EACH, v);
#pragma unroll
      for (int e = 0; e < EACH; e++) square += v[e] * v[e];
    }
    if (GROUPS > 1 || u == OWN - 1) {
      square = row_sum(square, row, pair);
      const int part = GROUPS > 1 ? unit + u : simd;
      if (pair == 0 && part < SQUARES) squares[part * 8 + row] = square;
      square = 0;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
float inverse = 1;
simdgroup_matrix<M, 8, 8> tokens[OWN * PAIRS];
float totals[OWN * 2];  // sums of a unit of the tokens that a lane has of a sum
threadgroup M* const staged = (threadgroup M*)memory + simd * 8 * UNIT;
#pragma unroll
for (int u = 0; u < OWN; u++) {
  float v[EACH], total = 0;
#pragma unroll
  for (int e = 0; e < EACH; e++) v[e] = 0;
  if (row < TOKENS && unit + u < UNITS) {
    const int at = (unit + u) * UNIT + pair * EACH;
    load_pack<EACH>(x + row * K + at, v);
    if constexpr (PROLOGUE > 0) {
      float factors[EACH], logits[EACH];
      load_pack<EACH>(weight + at, factors);
      if (PROLOGUE == 2) load_pack<EACH>(gate + row * K + at, logits);
      if (u == 0 || GROUPS > 1) {
        const int part = GROUPS > 1 ? (unit + u) / PARTS * PARTS : 0;
        float sum = 0;
        for (int i = 0; i < PARTS; i++) sum += squares[(part + i) * 8 + row];
        inverse = metal::precise::rsqrt(sum / (K / GROUPS) + as_type<float>(EPS));
      }
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        if (PROLOGUE == 1) v[e] = float(T(float(T(v[e] * inverse)) * factors[e]));
        if (PROLOGUE == 2) v[e] = factors[e] * (v[e] * inverse) * (1.0f / (1.0f + metal::precise::exp(-logits[e])));
      }
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) v[e] = float(O(v[e]));
  }
#pragma unroll
  for (int m = 0; m < PAIRS; m++) {
    const int at = first_of<MODE, BITS>(m);
    total += v[at] + v[at + GAP];
    *(threadgroup vec<M, 2>*)(staged + m * 64 + row * 8 + 2 * pair) = vec<M, 2>(M(v[at]), M(v[at + GAP]));
  }
  total = row_sum(total, row, pair);
  totals[2 * u] = simd_shuffle(total, ushort(lane_of(2 * pair, 0)));
  totals[2 * u + 1] = simd_shuffle(total, ushort(lane_of(2 * pair + 1, 0)));
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int m = 0; m < PAIRS; m++) simdgroup_load(tokens[u * PAIRS + m], staged + m * 64, 8, ulong2(0, 0), true);
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
if constexpr (MODE != 0) store_factors<PER_ROW, THREADS, S>(scale_words, index, scales);
if constexpr (MODE == 1) store_factors<PER_ROW, THREADS, S>(bias_words, index, biases);
threadgroup_barrier(mem_flags::mem_threadgroup);

threadgroup float* const sums = (threadgroup float*)memory;
for (int start = 0; start < TILES; start += AHEAD) {
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
    const int tile = start + a;
    const uint first_row = begin + tile * 16;
    if (tile >= TILES || first_row >= rows) break;
    thread uint* const held = words + a * 2 * OWN * WORDS;
    const threadgroup S* const own_scales = (const threadgroup S*)(scales + (MODE == 0 ? 0 : tile % 2 * FACTORS));
    const threadgroup S* const own_biases = (const threadgroup S*)(biases + (MODE == 1 ? tile % 2 * FACTORS : 0));
    float2 results[2] = {float2(0.0f), float2(0.0f)};
#pragma unroll
    for (int u = 0; u < OWN; u++) {
      simdgroup_matrix<float, 8, 8> products[2];
#pragma unroll
      for (int i = 0; i < 2; i++) products[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
#pragma unroll
      for (int m = 0; m < PAIRS; m += 2) {
        simdgroup_matrix<M, 8, 8> codes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const vec<M, 2> two = code_pair<MODE, BITS, M, W>(held + (i / 2 * OWN + u) * WORDS, m + i % 2);
          codes[i].thread_elements()[0] = two.x;
          codes[i].thread_elements()[1] = two.y;
        }
        multiply_tall(products, products + 1, codes, tokens[u * PAIRS + m], tokens[u * PAIRS + m + 1]);
      }
      const int group = metal::min(unit + u, UNITS - 1) * UNIT / GROUP;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = (i * 8 + row) * PITCH / int(sizeof(S)) + group;
        float scale = 1.0f, bias = 0.0f;
        if constexpr (MODE != 0) scale = load_scale<MODE, BITS>(own_scales, at);
        if constexpr (MODE == 1) bias = float(own_biases[at]) + code_offset<MODE, BITS, M>() * scale;
        results[i].x += scale * products[i].thread_elements()[0] + bias * totals[2 * u];
        results[i].y += scale * products[i].thread_elements()[1] + bias * totals[2 * u + 1];
      }
    }
    // What comes next: weights of a later tile are asked for, factors of the next one, asked for long ago, are shared.
    const uint later = first_row + AHEAD * 16;
    const int next = (a + 1) % AHEAD * A_THREAD, into = (tile + 1) % 2 * FACTORS;
    if (tile + AHEAD < TILES) load_rows<BITS, K, UNIT, OWN>(w, later, rows, unit, row, pair, held);
    if (AHEAD == 1 && tile + 1 < TILES) {
      if constexpr (MODE != 0) load_factors<PER_ROW, THREADS, IN_WORDS>(s, later, rows, index, scale_words);
      if constexpr (MODE == 1) load_factors<PER_ROW, THREADS, IN_WORDS>(b, later, rows, index, bias_words);
    }
    if constexpr (MODE != 0) store_factors<PER_ROW, THREADS, S>(scale_words + next, index, scales + into);
    if constexpr (MODE == 1) store_factors<PER_ROW, THREADS, S>(bias_words + next, index, biases + into);
    if (AHEAD > 1 && tile + AHEAD < TILES) {
      if constexpr (MODE != 0) load_factors<PER_ROW, THREADS, IN_WORDS>(s, later, rows, index, scale_words + a * A_THREAD);
      if constexpr (MODE == 1) load_factors<PER_ROW, THREADS, IN_WORDS>(b, later, rows, index, bias_words + a * A_THREAD);
    }
    threadgroup float* const sum_of = sums + tile % 2 * SIMDGROUPS * 128;  // the other half may still be read
#pragma unroll
    for (int i = 0; i < 2; i++) *(threadgroup float2*)(sum_of + simd * 128 + (i * 8 + row) * 8 + 2 * pair) = results[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = index; i < 16 * TOKENS; i += THREADS) {
      const uint n = first_row + i % 16;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < SIMDGROUPS; k++) sum += sum_of[k * 128 + i % 16 * 8 + i / 16];
      if (n < rows) {
        const ulong at = ulong(i / 16) * rows + n;
        if (HAS_RESIDUAL) sum += float(residual[at]);
        if (is_second) {
          second[at] = Y(sum);
        } else {
          first[at] = Y(sum);
        }
      }
    }
  }
}
