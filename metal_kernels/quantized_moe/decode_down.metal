// y[t] = residual_t + sum_j w_tj down_e h[t, j] + down_shared h[t, TOP_K], e the j-th chosen expert of token t.
// Closes what decode_gate_up opened: no [TOKENS, SLOTS, N] product ever reaches memory.
//
// h [TOKENS, SLOTS, K] float32, rows as decode_gate_up leaves them;  chosen [TOKENS, TOP_K] int32;  weights alike, float32
// down [E, N, K] packed;  shared_down [N, K] packed alike, arrays placed as in decode_gate_up;  residual [TOKENS, N] any float;  y [TOKENS, N] of type O, rounded
// once
// Grid: x over rows, y over tokens, TOKENS at a time. A threadgroup owns OWNED = ROWS * 32 / LANES rows of y of its tokens;
// its SIMDGROUPS simdgroups share out the experts, of which each is read once for all tokens that chose it, and meet in
// threadgroup memory (4 bytes a row, token and simdgroup). A simdgroup keeps there the scales and biases of OWNED rows of its
// expert as well.
// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES, OWNED = ROWS * PARALLEL, EACH = TOKENS * OWNED;
  constexpr int WORDS = STEP * BITS / 32, BLOCKS = K / STEP, PER_ROW = K / GROUP;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  constexpr int FACTORS = factor_words<MODE, OWNED, PER_ROW, S>(), BIASES = MODE == 1 ? FACTORS : 1;
  constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0;
  constexpr int PAIRS = TOKENS * TOP_K + SLOTS - TOP_K;  // the shared expert comes last
  threadgroup float partial[SIMDGROUPS * EACH];
  threadgroup uint scales[SIMDGROUPS * FACTORS], biases[SIMDGROUPS * BIASES];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint first = threadgroup_position_in_grid.x * OWNED, token = threadgroup_position_in_grid.y * TOKENS;
  const auto experts = chosen + token * TOP_K;
  threadgroup uint* own_scales = scales + simdgroup * FACTORS;
  threadgroup uint* own_biases = biases + simdgroup * BIASES;
  // 0, which no compiler knows: it would else unpack the weights once for all tokens, into more registers.
  const uint nothing = threadgroups_per_grid.z - 1;

  uint words[ROWS * WORDS];
  float sums[TOKENS * ROWS];
#pragma unroll
  for (int r = 0; r < TOKENS * ROWS; r++) sums[r] = 0.0f;
  for (int pair = simdgroup; pair < PAIRS; pair += SIMDGROUPS) {
    const bool is_shared = SLOTS > TOP_K && pair == TOKENS * TOP_K;
    const int chosen_here = is_shared ? 0 : experts[pair];
    int places[TOKENS];  // slot of each token in which it has this expert, or -1
    bool is_done = false;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      places[t] = TOKENS == 1 ? pair : is_shared ? TOP_K : slot_of(experts + t * TOP_K, TOP_K, chosen_here, lane);
      is_done = is_done || (!is_shared && t < pair / TOP_K && places[t] >= 0);
    }
    if (is_done) continue;
    const ulong expert = chosen_here, groups = expert * (N * PER_ROW);
    const auto dw = (const device uint*)(is_shared ? part<W, SHARED_DOWN_W>(shared_down_w) : part<W, DOWN_W>(down_w) + expert * MATRIX);
    const auto ds = is_shared ? part<S, SHARED_DOWN_S>(shared_down_s) : part<S, DOWN_S>(down_s) + groups;
    const auto db = is_shared ? part<S, SHARED_DOWN_B>(shared_down_b) : part<S, DOWN_B>(down_b) + groups;
    for (int start = 0; start < BLOCKS; start += LANES) {
      const int lanes = metal::min(LANES, BLOCKS - start), taken = metal::min(lane % LANES, lanes - 1);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint row = metal::min(first + r * PARALLEL + lane / LANES, uint(N - 1));
        load_words<WORDS>(dw + row * (K / 32 * BITS) + (start + taken) * WORDS, words + r * WORDS);
      }
      if (MODE != 0 && start == 0) {  // behind the first weights, which are under way meanwhile
        simdgroup_barrier(mem_flags::mem_threadgroup);
        share_factors<OWNED, PER_ROW, 32, IN_WORDS>(ds, first, N, lane, own_scales);
        if constexpr (MODE == 1) share_factors<OWNED, PER_ROW, 32, IN_WORDS>(db, first, N, lane, own_biases);
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        if (TOKENS > 1 && places[t] < 0) continue;
        const float weight = is_shared ? 1.0f : weights[(token + t) * TOP_K + places[t]];
        uint x[STEP];
        const device uint4* const from = (const device uint4*)(h + ((token + t) * SLOTS + places[t]) * K + start * STEP);
#pragma unroll
        for (int i = 0; i < STEP / 4; i++) {
          const uint4 v = from[i * lanes + taken];
          x[4 * i] = v.x;
          x[4 * i + 1] = v.y;
          x[4 * i + 2] = v.z;
          x[4 * i + 3] = v.w;
        }
        if (TOKENS > 1) {
#pragma unroll
          for (int i = 0; i < ROWS * WORDS; i++) words[i] ^= nothing;
        }
        const XBlock<STEP> xs = make_block<MODE, BITS, STEP, float>(x, lane % LANES < lanes);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          sums[t * ROWS + r] += weight * row_dot<MODE, BITS, GROUP, K, STEP, W>(
                                             words + r * WORDS, (const threadgroup S*)own_scales,
                                             (const threadgroup S*)own_biases, r * PARALLEL + lane / LANES, start + taken, xs);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TOKENS * ROWS; i++) {
    const float sum = lanes_sum<LANES>(sums[i]);
    const int r = i % ROWS;
    if (lane % LANES == 0) partial[simdgroup * EACH + i / ROWS * OWNED + r * PARALLEL + lane / LANES] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index_in_threadgroup; i < EACH; i += 32 * SIMDGROUPS) {
    const uint row = first + i % OWNED;
    if (row < N) {
      float sum = 0.0f;
      for (int j = 0; j < SIMDGROUPS; j++) sum += partial[j * EACH + i];
      const uint at = (token + i / OWNED) * N + row;
      if (HAS_RESIDUAL) sum += float(residual[at]);
      y[at] = O(sum);
    }
  }
