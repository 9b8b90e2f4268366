// h[t, j] = silu(gate_e x_t) * (up_e x_t), e the j-th chosen expert of token t; slot TOP_K is the shared expert.
// For 1 to 8 tokens: what counts is that every byte of weights is read once, in 16-byte packs next to each other.
//
// x [T, K] X;  chosen [T, TOP_K] int32;  gate, up [E, N, K] packed;  shared_gate, shared_up [N, K] packed alike
// h [T, SLOTS, N] float32, each row in the order in which decode_down's lanes read it: DOWN_STEP values, DOWN_LANES lanes
// Grid: x over rows, y over slots, z over tokens. A simdgroup owns OWNED = ROWS * 32 / LANES rows of both matrices: LANES
// lanes share a row, the gate and up products of a row are in the same lanes. The SIMDGROUPS of a threadgroup share x and
// the scales and biases of their rows. K is a multiple of STEP.
// Threadgroup memory: sizeof(X) K bytes and the scales and biases of 2 SIMDGROUPS OWNED rows.
// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES, OWNED = ROWS * PARALLEL, TOGETHER = SIMDGROUPS * OWNED, THREADS = 32 * SIMDGROUPS;
  constexpr int WORDS = STEP * BITS / 32, BLOCKS = K / STEP, PER_ROW = K / GROUP;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  constexpr int FACTORS = factor_words<MODE, TOGETHER, PER_ROW, S>();
  constexpr bool IN_WORDS = N * PER_ROW * sizeof(S) % 4 == 0;
  threadgroup uint4 packs[K * sizeof(X) / 16];
  threadgroup uint gate_scales[FACTORS], up_scales[FACTORS];
  threadgroup uint gate_biases[MODE == 1 ? FACTORS : 1], up_biases[MODE == 1 ? FACTORS : 1];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int index = thread_index_in_threadgroup;
  const uint slot = threadgroup_position_in_grid.y, token = threadgroup_position_in_grid.z;
  const uint first = threadgroup_position_in_grid.x * TOGETHER;
  const int own = simdgroup * OWNED + lane / LANES;  // this lane's first row, from the threadgroup's
  const bool is_shared = SLOTS > TOP_K && slot == TOP_K;
  const ulong expert = is_shared ? 0 : chosen[token * TOP_K + slot];
  const ulong groups = expert * (N * PER_ROW);
  const auto gw = (const device uint*)(is_shared ? shared_gate_w : gate_w + expert * MATRIX);
  const auto gs = is_shared ? shared_gate_s : gate_s + groups;
  const auto gb = is_shared ? shared_gate_b : gate_b + groups;
  const auto uw = (const device uint*)(is_shared ? shared_up_w : up_w + expert * MATRIX);
  const auto us = is_shared ? shared_up_s : up_s + groups;
  const auto ub = is_shared ? shared_up_b : up_b + groups;

  uint gate_words[ROWS * WORDS], up_words[ROWS * WORDS];
  float gate[ROWS], up[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) gate[r] = up[r] = 0.0f;
  for (int start = 0; start < BLOCKS; start += LANES) {
    const int block = metal::min(start + lane % LANES, BLOCKS - 1);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = metal::min(first + own + r * PARALLEL, uint(N - 1));
      load_words<WORDS>(gw + row * (K / 32 * BITS) + block * WORDS, gate_words + r * WORDS);
      load_words<WORDS>(uw + row * (K / 32 * BITS) + block * WORDS, up_words + r * WORDS);
    }
    if (start == 0) {  // behind the first weights, which are under way meanwhile
      const device uint4* const from = (const device uint4*)(x + token * K);
      for (int i = index; i < K * int(sizeof(X)) / 16; i += THREADS) packs[i] = from[i];
      if constexpr (MODE != 0) {
        share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(gs, first, N, index, gate_scales);
        share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(us, first, N, index, up_scales);
      }
      if constexpr (MODE == 1) {
        share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(gb, first, N, index, gate_biases);
        share_factors<TOGETHER, PER_ROW, THREADS, IN_WORDS>(ub, first, N, index, up_biases);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const XBlock<STEP> xs = shared_x<MODE, BITS, STEP, X>(packs, block, start + lane % LANES < BLOCKS);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      gate[r] += row_dot<MODE, BITS, GROUP, K, STEP, W>(gate_words + r * WORDS, (const threadgroup S*)gate_scales,
                                                        (const threadgroup S*)gate_biases, own + r * PARALLEL, block, xs);
      up[r] += row_dot<MODE, BITS, GROUP, K, STEP, W>(up_words + r * WORDS, (const threadgroup S*)up_scales,
                                                      (const threadgroup S*)up_biases, own + r * PARALLEL, block, xs);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = first + own + r * PARALLEL;
    const float value = swiglu(lanes_sum<LANES>(gate[r]), lanes_sum<LANES>(up[r]));
    if (lane % LANES == 0 && row < N) {
      h[(token * SLOTS + slot) * N + interleaved<N, DOWN_STEP, DOWN_LANES>(row)] = value;
    }
  }
