// h[t, j] = silu(gate_e x_t) * (up_e x_t), e the j-th chosen expert of token t; slot TOP_K is the shared expert.
// For 1 to 8 tokens: what counts is that every byte of weights is read once, in 16-byte packs next to each other.
//
// x [T, K] X;  chosen [T, TOP_K] int32;  gate, up [E, N, K] packed;  shared_gate, shared_up [N, K] packed alike
// h [T, SLOTS, N] float32
// Grid: x over rows, y over slots, z over tokens. A simdgroup owns ROWS * 32 / LANES rows of both matrices: LANES lanes
// share a row, the gate and up products of a row are in the same lanes, x is read once for all. K is a multiple of STEP.
// No threadgroup memory.
// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  const uint lane = thread_index_in_simdgroup;
  const uint slot = threadgroup_position_in_grid.y, token = threadgroup_position_in_grid.z;
  const uint simdgroup = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
  const uint first = simdgroup * (ROWS * PARALLEL) + lane / LANES;
  const bool is_shared = SLOTS > TOP_K && slot == TOP_K;
  const ulong expert = is_shared ? 0 : chosen[token * TOP_K + slot];
  const ulong groups = expert * (N * (K / GROUP));
  const auto gw = is_shared ? shared_gate_w : gate_w + expert * MATRIX;
  const auto gs = is_shared ? shared_gate_s : gate_s + groups;
  const auto gb = is_shared ? shared_gate_b : gate_b + groups;
  const auto uw = is_shared ? shared_up_w : up_w + expert * MATRIX;
  const auto us = is_shared ? shared_up_s : up_s + groups;
  const auto ub = is_shared ? shared_up_b : up_b + groups;

  float gate[ROWS], up[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) gate[r] = up[r] = 0.0f;
  for (int step = lane % LANES; step < K / STEP; step += LANES) {
    const XBlock<STEP> xs = load_x<MODE, BITS, STEP>(x + token * K + step * STEP);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = min(first + r * PARALLEL, uint(N - 1));
      gate[r] += row_dot<MODE, BITS, GROUP, K, STEP>(gw, gs, gb, row, step, xs);
      up[r] += row_dot<MODE, BITS, GROUP, K, STEP>(uw, us, ub, row, step, xs);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = first + r * PARALLEL;
    const float value = swiglu(lanes_sum<LANES>(gate[r]), lanes_sum<LANES>(up[r]));
    if (lane % LANES == 0 && row < N) h[(token * SLOTS + slot) * N + row] = value;
  }
