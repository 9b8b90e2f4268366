// y[t] = residual_t + sum_j w_tj down_e h[t, j] + down_shared h[t, TOP_K], e the j-th chosen expert of token t.
// Closes what decode_gate_up opened: no [T, SLOTS, N] product ever reaches memory.
//
// h [T, SLOTS, K] float32;  chosen [T, TOP_K] int32;  weights [T, TOP_K] float32;  down [E, N, K] packed
// shared_down [N, K] packed alike;  residual [T, N] any float;  y [T, N] of type O, rounded once
// Grid: x over rows, y over tokens. A threadgroup owns ROWS * 32 / LANES rows of y; its SIMDGROUPS simdgroups share the
// slots out and meet in threadgroup memory (4 bytes a row and simdgroup), summed in the order of the slots.
// ---- kernel ----
  constexpr int PARALLEL = 32 / LANES, OWNED = ROWS * PARALLEL;
  constexpr int MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  threadgroup float partial[SIMDGROUPS * OWNED];
  const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint token = threadgroup_position_in_grid.y;
  const uint first = threadgroup_position_in_grid.x * OWNED;

  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
  for (uint slot = simdgroup; slot < SLOTS; slot += SIMDGROUPS) {
    const bool is_shared = SLOTS > TOP_K && slot == TOP_K;
    const ulong expert = is_shared ? 0 : chosen[token * TOP_K + slot];
    const float weight = is_shared ? 1.0f : weights[token * TOP_K + slot];
    const ulong groups = expert * (N * (K / GROUP));
    const auto dw = is_shared ? shared_down_w : down_w + expert * MATRIX;
    const auto ds = is_shared ? shared_down_s : down_s + groups;
    const auto db = is_shared ? shared_down_b : down_b + groups;
    for (int step = lane % LANES; step < K / STEP; step += LANES) {
      const XBlock<STEP> xs = load_x<MODE, BITS, STEP>(h + (token * SLOTS + slot) * K + step * STEP);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const uint row = min(first + r * PARALLEL + lane / LANES, uint(N - 1));
        sums[r] += weight * row_dot<MODE, BITS, GROUP, K, STEP>(dw, ds, db, row, step, xs);
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
