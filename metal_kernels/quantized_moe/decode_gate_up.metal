// h[t, j] = silu(gate_e x_t) * (up_e x_t), e the j-th chosen expert of token t; slot TOP_K is the shared expert.
// For 1 to 8 tokens: what counts is that every byte of weights is read once, in 16-byte packs next to each other.
//
// x [TOKENS, K] X;  chosen [TOKENS, TOP_K] int32;  gate, up [E, N, K] packed;  shared_gate, shared_up [N, K] packed alike;
// each of their arrays so many words behind the start of what it is bound with (GATE_W and so on), as all may be one buffer
// h [TOKENS, SLOTS, N] float32, each row in the order in which decode_down's lanes read it: DOWN_STEP values, DOWN_LANES
// lanes
// Grid: x over rows, y over slots, z over tokens. A simdgroup owns OWNED = ROWS * 32 / LANES rows of both matrices: LANES
// lanes share a row, the gate and up products of a row are in the same lanes. The SIMDGROUPS of a threadgroup share x and
// the scales and biases of their rows. Of tokens that chose the same expert, the first one's threadgroups serve all, one
// after the other: of several tokens a lane keeps its weights in registers, of one only those of a step. K is a multiple of STEP.
// Threadgroup memory: sizeof(X) K bytes, the scales and biases of 2 SIMDGROUPS OWNED rows, and 4 bytes a token.
//
// With choose.metal before it (CHOOSES_EXPERTS) one token's experts are chosen here: logits [E] and bias [E] stand in the place of
// chosen, and each threadgroup but the shared expert's makes the choice for itself, while x comes. chosen and weights [TOP_K] are
// written once, for decode_down. That costs a dispatch less, and 4 (E + GROUPS + TOP_K) bytes more.

// Block `block` of each of a lane's rows, which lie `apart`; behind the last row stands the last.
template <int ROWS, int WORDS, int ROW_WORDS>
METAL_FUNC void load_rows(const device uint* w, uint first, uint apart, uint last, int block, thread uint* words) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    load_words<WORDS>(w + metal::min(first + r * apart, last) * ROW_WORDS + block * WORDS, words + r * WORDS);
  }
}

// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES, OWNED = ROWS * PARALLEL, TOGETHER = SIMDGROUPS * OWNED, THREADS = 32 * SIMDGROUPS;
  constexpr int WORDS = STEP * BITS / 32, BLOCKS = K / STEP, PER_ROW = K / GROUP, ROW_WORDS = K / 32 * BITS;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS), STEPS = (BLOCKS + LANES - 1) / LANES;
  constexpr int CHUNK = STEP < 8 ? STEP : 8, EACH = 16 / sizeof(X);
  constexpr int HELD = TOKENS == 1 ? 1 : STEPS;  // steps whose weights are in registers
  constexpr int FACTORS = factor_words<MODE, TOGETHER, PER_ROW, S>();
  constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0;
  threadgroup uint4 packs[K * sizeof(X) / 16];
  threadgroup uint gate_scales[FACTORS], up_scales[FACTORS];
  threadgroup uint gate_biases[MODE == 1 ? FACTORS : 1], up_biases[MODE == 1 ? FACTORS : 1];
  threadgroup int places[TOKENS];  // slot of each token in which it has this expert, or -1
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int index = thread_index_in_threadgroup;
  const uint slot = threadgroup_position_in_grid.y, token = threadgroup_position_in_grid.z;
  const uint first = threadgroup_position_in_grid.x * TOGETHER;
  const int own = simdgroup * OWNED + lane / LANES;  // this lane's first row, from the threadgroup's
  const bool is_shared = SLOTS > TOP_K && slot == TOP_K;
#ifdef CHOOSES_EXPERTS
  for (int i = index; i < K * int(sizeof(X)) / 16; i += THREADS) {
    packs[chunked<STEP, CHUNK, BLOCKS>(i * EACH) / EACH] = ((const device uint4*)x)[i];
  }
  threadgroup float biased[E], best[GROUPS];
  threadgroup int picked[TOP_K];
  if (!is_shared) {
    uint expert_of_lane = 0;
    float weight_of_lane = 0;
    choose<E, TOP_K, GROUPS, TOPK_GROUP, SIMDGROUPS, HAS_BIAS, NORMALIZE>(
        logits, bias, as_type<float>(SCALING), index, simdgroup, lane, biased, best, expert_of_lane, weight_of_lane);
    if (simdgroup == 0 && lane < TOP_K) {
      picked[lane] = int(expert_of_lane);
      if (slot == 0 && first == 0) {  // for decode_down
        chosen[lane] = int(expert_of_lane);
        weights[lane] = weight_of_lane;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int chosen_here = is_shared ? 0 : picked[slot];
#else
  const int chosen_here = is_shared ? 0 : chosen[token * TOP_K + slot];
#endif
  const ulong expert = chosen_here, groups = expert * (N * PER_ROW);
  const auto gw = (const device uint*)(is_shared ? part<W, SHARED_GATE_W>(shared_gate_w) : part<W, GATE_W>(gate_w) + expert * MATRIX);
  const auto gs = is_shared ? part<S, SHARED_GATE_S>(shared_gate_s) : part<S, GATE_S>(gate_s) + groups;
  const auto gb = is_shared ? part<S, SHARED_GATE_B>(shared_gate_b) : part<S, GATE_B>(gate_b) + groups;
  const auto uw = (const device uint*)(is_shared ? part<W, SHARED_UP_W>(shared_up_w) : part<W, UP_W>(up_w) + expert * MATRIX);
  const auto us = is_shared ? part<S, SHARED_UP_S>(shared_up_s) : part<S, UP_S>(up_s) + groups;
  const auto ub = is_shared ? part<S, SHARED_UP_B>(shared_up_b) : part<S, UP_B>(up_b) + groups;
  if constexpr (TOKENS > 1) {
    bool is_done = false;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {  // all are under way before one is waited for
      const int at = slot_of(chosen + t * TOP_K, TOP_K, chosen_here, lane);
      is_done = is_done || (t < int(token) && (is_shared || at >= 0));
      if (index == 0) places[t] = is_shared ? TOP_K : at;
    }
    if (is_done) return;  // the threadgroups of an earlier token do it
  }

  uint gate_words[ROWS * HELD * WORDS], up_words[ROWS * HELD * WORDS];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int block = metal::min(i * LANES + lane % LANES, BLOCKS - 1);
    load_rows<ROWS, WORDS, ROW_WORDS>(gw, first + own, PARALLEL, N - 1, block, gate_words + i * ROWS * WORDS);
    load_rows<ROWS, WORDS, ROW_WORDS>(uw, first + own, PARALLEL, N - 1, block, up_words + i * ROWS * WORDS);
  }
  // Behind the first weights, which are under way meanwhile.
  if constexpr (MODE != 0) {
    share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(gs, first, N, index, gate_scales);
    share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(us, first, N, index, up_scales);
  }
  if constexpr (MODE == 1) {
    share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(gb, first, N, index, gate_biases);
    share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(ub, first, N, index, up_biases);
  }
  // 0, which no compiler knows: it would else unpack the weights before the loop, into more registers.
  const uint nothing = threadgroups_per_grid.z - TOKENS;
  for (uint t = token; t < TOKENS; t++) {
    uint at = slot;
    if (TOKENS > 1 && t > token) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (places[t] < 0) continue;
      at = places[t];
    }
#ifndef CHOOSES_EXPERTS
    const device uint4* const from = (const device uint4*)(x + t * K);
    for (int i = index; i < K * int(sizeof(X)) / 16; i += THREADS) {
      packs[chunked<STEP, CHUNK, BLOCKS>(i * EACH) / EACH] = from[i];
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float gate[ROWS], up[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) gate[r] = up[r] = 0.0f;
    if (TOKENS > 1) {
#pragma unroll
      for (int i = 0; i < ROWS * HELD * WORDS; i++) {
        gate_words[i] ^= nothing;
        up_words[i] ^= nothing;
      }
    }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int block = metal::min(i * LANES + lane % LANES, BLOCKS - 1);
      if (TOKENS == 1 && i > 0) {
        load_rows<ROWS, WORDS, ROW_WORDS>(gw, first + own, PARALLEL, N - 1, block, gate_words);
        load_rows<ROWS, WORDS, ROW_WORDS>(uw, first + own, PARALLEL, N - 1, block, up_words);
      }
      const XBlock<STEP> xs = shared_x<MODE, BITS, STEP, CHUNK, BLOCKS, X>(packs, block, i * LANES + lane % LANES < BLOCKS);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int words = (TOKENS == 1 ? r : i * ROWS + r) * WORDS;
        gate[r] += row_dot<MODE, BITS, GROUP, K, STEP, W>(gate_words + words, (const threadgroup S*)gate_scales,
                                                          (const threadgroup S*)gate_biases, own + r * PARALLEL, block, xs);
        up[r] += row_dot<MODE, BITS, GROUP, K, STEP, W>(up_words + words, (const threadgroup S*)up_scales,
                                                        (const threadgroup S*)up_biases, own + r * PARALLEL, block, xs);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = first + own + r * PARALLEL;
      const float value = swiglu(lanes_sum<LANES>(gate[r]), lanes_sum<LANES>(up[r]));
      if (lane % LANES == 0 && row < N) {
        h[(t * SLOTS + at) * N + interleaved<N, DOWN_STEP, DOWN_LANES>(row)] = value;
      }
    }
  }
