// y[t] = residual_t + sum_j w_tj down_e h[t, j] + down_shared h[t, TOP_K], e the j-th chosen expert of token t.
// Closes what decode_gate_up opened: no [T, SLOTS, N] product ever reaches memory.
//
// h [T, SLOTS, K] float32, rows as decode_gate_up leaves them;  chosen [T, TOP_K] int32;  weights [T, TOP_K] float32
// down [E, N, K] packed;  shared_down [N, K] packed alike;  residual [T, N] any float;  y [T, N] of type O, rounded once
// Grid: x over rows, y over tokens. A threadgroup owns OWNED = ROWS * 32 / LANES rows of y; its SIMDGROUPS simdgroups share
// the slots out and meet in threadgroup memory (4 bytes a row and simdgroup), summed in the order of the slots. A simdgroup
// keeps there the scales and biases of OWNED rows of its slot's expert as well.
// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES, OWNED = ROWS * PARALLEL;
  constexpr int WORDS = STEP * BITS / 32, BLOCKS = K / STEP, PER_ROW = K / GROUP;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  constexpr int FACTORS = factor_words<MODE, OWNED, PER_ROW, S>(), BIASES = MODE == 1 ? FACTORS : 1;
  constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0;
  threadgroup float partial[SIMDGROUPS * OWNED];
  threadgroup uint scales[SIMDGROUPS * FACTORS], biases[SIMDGROUPS * BIASES];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint token = threadgroup_position_in_grid.y;
  const uint first = threadgroup_position_in_grid.x * OWNED;
  threadgroup uint* own_scales = scales + simdgroup * FACTORS;
  threadgroup uint* own_biases = biases + simdgroup * BIASES;

  uint words[ROWS * WORDS];
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
  for (uint slot = simdgroup; slot < SLOTS; slot += SIMDGROUPS) {
    const bool is_shared = SLOTS > TOP_K && slot == TOP_K;
    const ulong expert = is_shared ? 0 : chosen[token * TOP_K + slot];
    const float weight = is_shared ? 1.0f : weights[token * TOP_K + slot];
    const ulong groups = expert * (N * PER_ROW);
    const auto dw = (const device uint*)(is_shared ? shared_down_w : down_w + expert * MATRIX);
    const auto ds = is_shared ? shared_down_s : down_s + groups;
    const auto db = is_shared ? shared_down_b : down_b + groups;
    for (int start = 0; start < BLOCKS; start += LANES) {
      const int lanes = metal::min(LANES, BLOCKS - start), taken = metal::min(lane % LANES, lanes - 1);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint row = metal::min(first + r * PARALLEL + lane / LANES, uint(N - 1));
        load_words<WORDS>(dw + row * (K / 32 * BITS) + (start + taken) * WORDS, words + r * WORDS);
      }
      uint x[STEP];
      const device uint4* const from = (const device uint4*)(h + (token * SLOTS + slot) * K + start * STEP);
#pragma unroll
      for (int i = 0; i < STEP / 4; i++) {
        const uint4 v = from[i * lanes + taken];
        x[4 * i] = v.x;
        x[4 * i + 1] = v.y;
        x[4 * i + 2] = v.z;
        x[4 * i + 3] = v.w;
      }
      if (MODE != 0 && start == 0) {  // behind the first weights, which are under way meanwhile
        simdgroup_barrier(mem_flags::mem_threadgroup);
        share_factors<OWNED, PER_ROW, 32, IN_WORDS>(ds, first, N, lane, own_scales);
        if constexpr (MODE == 1) share_factors<OWNED, PER_ROW, 32, IN_WORDS>(db, first, N, lane, own_biases);
        simdgroup_barrier(mem_flags::mem_threadgroup);
      }
      const XBlock<STEP> xs = make_block<MODE, BITS, STEP, float>(x, lane % LANES < lanes);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        sums[r] += weight * row_dot<MODE, BITS, GROUP, K, STEP, W>(
                                words + r * WORDS, (const threadgroup S*)own_scales, (const threadgroup S*)own_biases,
                                r * PARALLEL + lane / LANES, start + taken, xs);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = lanes_sum<LANES>(sums[r]);
    if (lane % LANES == 0) partial[simdgroup * OWNED + r * PARALLEL + lane / LANES] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint owned = thread_index_in_threadgroup; owned < OWNED && first + owned < N; owned += 32 * SIMDGROUPS) {
    float sum = 0.0f;
    for (int i = 0; i < SIMDGROUPS; i++) sum += partial[i * OWNED + owned];
    const uint at = token * N + first + owned;
    if (HAS_RESIDUAL) sum += float(residual[at]);
    y[at] = O(sum);
  }
