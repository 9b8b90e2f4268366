// Products of 1 to 8 tokens with one or two packed matrices, with what stands before and after: a norm or the linear
// gate, and the residual. Every weight is read once for all tokens, and asked for before the norm is known.
//
//   PROLOGUE 0: a = x;  1: a = weight * x / sqrt(mean(x^2) + eps);  2: a = linear_gate(x, gate) over GROUPS groups
//   first = residual + a first_w^T,  second = a second_w^T
//
// Layout        x, gate [TOKENS, K]; weight [K]; first_w [N, K], second_w [SECOND, K] packed alike;
//               residual, first [TOKENS, N]; second [TOKENS, SECOND]
// Grid          x: rows of first_w, then of second_w; a threadgroup owns OWNED = TEAMS ROWS of them.
// Threadgroup   TEAMS teams of TEAM simdgroups. A team owns ROWS rows: a lane keeps its blocks of STEP weights of each
//               in registers, and the same blocks of a. For TOGETHER tokens at a time the threadgroup makes `a` once, in
//               threadgroup memory, from packs of P channels; SPLIT simdgroups share a group of the norm. Each weight is
//               unpacked once for them.
// Requires      K a multiple of 32; SIZE = K / GROUPS of P.
// Rounds        a to O, by way of T in the norm as MLX does; sums in float; y once, to Y.
//               Threadgroup memory: TOGETHER (sizeof(O) K + 4 GROUPS SPLIT) + 4 TOKENS OWNED TEAM bytes, and the scales and
//               biases of OWNED rows.
// ---- kernel ----
constexpr int SIMDGROUPS = TEAMS * TEAM, THREADS = SIMDGROUPS * 32, OWNED = TEAMS * ROWS;
constexpr int WORDS = STEP * BITS / 32, BLOCKS = K / STEP, LANES = TEAM * 32, STEPS = (BLOCKS + LANES - 1) / LANES;
constexpr int SIZE = K / GROUPS, SPLIT = SIMDGROUPS > GROUPS ? SIMDGROUPS / GROUPS : 1, UNITS = GROUPS * SPLIT;
constexpr int PER = (UNITS + SIMDGROUPS - 1) / SIMDGROUPS, STRIDE = SPLIT * 32 * P;
constexpr int PACKS = (SIZE + STRIDE - 1) / STRIDE, HELD = PER * PACKS * P, CHUNK = STEP < 8 ? STEP : 8;
constexpr int FIRST = (N + OWNED - 1) / OWNED;
const int simd = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int team = simd / TEAM, member = simd % TEAM * 32 + lane;
const int index = threadgroup_position_in_grid.x;
const bool is_second = SECOND > 0 && index >= FIRST;
const int rows = is_second ? SECOND : N, first_row = (is_second ? index - FIRST : index) * OWNED;
const auto w = is_second ? second_w : first_w;
const auto s = is_second ? second_s : first_s;
const auto b = is_second ? second_b : first_b;
const float eps = as_type<float>(EPS);
threadgroup uint4 packs[TOGETHER * K * sizeof(O) / 16];  // an array of O would start at a multiple of its own size only
threadgroup O* shared = (threadgroup O*)packs;
threadgroup float sums[TOGETHER * UNITS];
threadgroup float partial[TOKENS * OWNED * TEAM];

uint words[ROWS * STEPS * WORDS];
#pragma unroll
for (int n = 0; n < ROWS; n++) {
  const uint row = metal::min(first_row + team * ROWS + n, rows - 1);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const uint block = metal::min(i * LANES + member, BLOCKS - 1);
    load_words<WORDS>((const device uint*)w + row * (K / 32 * BITS) + block * WORDS, words + (n * STEPS + i) * WORDS);
  }
}
constexpr int PER_ROW = K / GROUP;
constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0 && SECOND * PER_ROW * sizeof(S) % 4 == 0;
threadgroup uint scales[factor_words<MODE, OWNED, PER_ROW, S>()];
threadgroup uint biases[MODE == 1 ? factor_words<MODE, OWNED, PER_ROW, S>() : 1];
if constexpr (MODE != 0) {
  share_factors<OWNED, PER_ROW, THREADS, IN_WORDS>(s, first_row, rows, thread_index_in_threadgroup, scales);
}
if constexpr (MODE == 1) {
  share_factors<OWNED, PER_ROW, THREADS, IN_WORDS>(b, first_row, rows, thread_index_in_threadgroup, biases);
}

// 0, as the grid has one y, which no compiler knows: it would else unpack the weights before the loop, into 32 registers
// a row.
const uint nothing = threadgroups_per_grid.y - 1;
for (int start = 0; start < TOKENS; start += TOGETHER) {
  if (TOKENS > TOGETHER) {
#pragma unroll
    for (int i = 0; i < ROWS * STEPS * WORDS; i++) words[i] ^= nothing;
  }
  float values[TOGETHER * HELD], factors[HELD], logits[TOGETHER * HELD];
#pragma unroll
  for (int k = 0; k < TOGETHER; k++) {
    const int t = metal::min(start + k, TOKENS - 1);
#pragma unroll
    for (int u = 0; u < PER; u++) {
      const int unit = u * SIMDGROUPS + simd;
      if (unit < UNITS) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
          const int channel = i * STRIDE + (unit % SPLIT * 32 + lane) * P;
          const int at = unit / SPLIT * SIZE + channel, n = (u * PACKS + i) * P;
          thread float* const v = values + k * HELD + n;
          if (channel < SIZE) {
            load_pack<P>(x + t * K + at, v);
            if (PROLOGUE > 0 && k == 0) load_pack<P>(weight + at, factors + n);
            if (PROLOGUE == 2) load_pack<P>(gate + t * K + at, logits + k * HELD + n);
#pragma unroll
            for (int e = 0; e < P; e++) sum += v[e] * v[e];
          }
        }
        if (PROLOGUE > 0) sum = simd_sum(sum);
        if (lane == 0) sums[k * UNITS + unit] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int k = 0; k < TOGETHER; k++) {
#pragma unroll
    for (int u = 0; u < PER; u++) {
      const int unit = u * SIMDGROUPS + simd;
      if (unit < UNITS) {
        float inverse = 0;
        for (int i = 0; i < SPLIT; i++) inverse += sums[k * UNITS + unit / SPLIT * SPLIT + i];
        inverse = metal::precise::rsqrt(inverse / SIZE + eps);
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
          const int channel = i * STRIDE + (unit % SPLIT * 32 + lane) * P;
          const int at = unit / SPLIT * SIZE + channel;
          if (channel < SIZE) {
            const int place = chunked<STEP, CHUNK, BLOCKS>(at);
            threadgroup Pack<O, P>& out = *(threadgroup Pack<O, P>*)(shared + k * K + place);
#pragma unroll
            for (int e = 0; e < P; e++) {
              const int n = (u * PACKS + i) * P + e;
              float value = values[k * HELD + n];
              if (PROLOGUE == 1) value = float(T(float(T(value * inverse)) * factors[n]));
              if (PROLOGUE == 2) {
                const float logit = logits[k * HELD + n];
                value = factors[n] * (value * inverse) * (1.0f / (1.0f + metal::precise::exp(-logit)));
              }
              out.e[e] = O(value);
            }
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float dots[ROWS * TOGETHER];
#pragma unroll
  for (int n = 0; n < ROWS * TOGETHER; n++) dots[n] = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int block = metal::min(i * LANES + member, BLOCKS - 1);
    const bool is_inside = i * LANES + member < BLOCKS;
    if constexpr (TOGETHER == 1) {
      const XBlock<STEP> xs = shared_x<MODE, BITS, STEP, CHUNK, BLOCKS, O>(packs, block, is_inside);
#pragma unroll
      for (int n = 0; n < ROWS; n++) {
        dots[n] += row_dot<MODE, BITS, GROUP, K, STEP, W>(words + (n * STEPS + i) * WORDS, (const threadgroup S*)scales,
                                                          (const threadgroup S*)biases, team * ROWS + n, block, xs);
      }
    } else if (is_inside) {
      rows_dot<MODE, BITS, GROUP, K, STEP, CHUNK, ROWS, TOGETHER, W, O>(
          words + i * WORDS, STEPS * WORDS, (const threadgroup S*)scales, (const threadgroup S*)biases, team * ROWS, block,
          (const threadgroup uint*)packs, dots);
    }
  }
#pragma unroll
  for (int n = 0; n < ROWS * TOGETHER; n++) {
    const float dot = simd_sum(dots[n]);
    const int t = start + n % TOGETHER;
    if (lane == 0 && t < TOKENS) partial[(t * OWNED + team * ROWS + n / TOGETHER) * TEAM + simd % TEAM] = dot;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index_in_threadgroup; i < TOKENS * OWNED; i += THREADS) {
  const int row = first_row + i % OWNED;
  if (row < rows) {
    float sum = 0;
    for (int k = 0; k < TEAM; k++) sum += partial[i * TEAM + k];
    const ulong at = ulong(i / OWNED) * rows + row;
    if (HAS_RESIDUAL) sum += float(residual[at]);
    if (is_second) {
      second[at] = Y(sum);
    } else {
      first[at] = Y(sum);
    }
  }
}
