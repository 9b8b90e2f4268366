// h[p] = silu(gate_e x_t) * (up_e x_t) for the pairs (token t, expert e) sorted by expert; rows TOTAL + t are those of the
// shared expert. One product with gate and up side by side; x is read through `order`, never copied.
//
// x [T, K] X;  order [TOTAL] uint32;  tiles as plan.metal writes them;  gate, up [E, N, K] packed
// shared_gate, shared_up [N, K] packed alike;  h [TOTAL (+ T), N] of type T, the operands' type
// Grid: x over columns of h, y over tiles. A threadgroup owns BM rows x BN / 2 columns; N is a multiple of BN / 2. Sums in
// float. Threadgroup memory (BM + BN) (BK + 16 / sizeof(T)) sizeof(T) bytes: at most 18,432.
// ---- kernel ----
  constexpr int CHUNK = 16 / sizeof(T), LD = BK + CHUNK, THREADS = 32 * WM * WN, HALF = BN / 2;
  constexpr int XCHUNKS = BM * (BK / CHUNK) / THREADS, MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  threadgroup uint4 packs[(BM + BN) * LD / CHUNK];  // an array of T would start at a multiple of its own size only
  threadgroup T* tile = (threadgroup T*)packs;
  const uint thread_index = thread_index_in_threadgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint column = threadgroup_position_in_grid.x * HALF, at = 4 * threadgroup_position_in_grid.y;
  const int total = order_shape[0], first = tiles[at + 1], last = tiles[at + 2];
  if (first >= last) return;
  const bool is_shared = first >= total;
  const ulong expert = is_shared ? 0 : tiles[at], groups = expert * (N * (K / GROUP));

  uint rows[XCHUNKS];
#pragma unroll
  for (int i = 0; i < XCHUNKS; i++) {
    const int p = min(first + int(thread_index + i * THREADS) / (BK / CHUNK), last - 1);
    rows[i] = is_shared ? p - total : order[p] / TOP_K;
  }
  simdgroup_matrix<float, 8, 8> acc[BM / WM / 8 * (BN / WN / 8)];
  grouped_product<MODE, BITS, GROUP, N, K, BM, BN, BK, WM, WN, HALF>(
      x, rows, is_shared ? shared_gate_w : gate_w + expert * MATRIX, is_shared ? shared_gate_s : gate_s + groups,
      is_shared ? shared_gate_b : gate_b + groups, is_shared ? shared_up_w : up_w + expert * MATRIX,
      is_shared ? shared_up_s : up_s + groups, is_shared ? shared_up_b : up_b + groups, column, thread_index, simdgroup,
      tile, acc);

  threadgroup float* sums = (threadgroup float*)tile;
  share_sums<BM, BN, WM, WN>(acc, simdgroup, sums);
  for (int c = thread_index; c < BM * (HALF / CHUNK); c += THREADS) {
    const int row = c / (HALF / CHUNK), n = c % (HALF / CHUNK) * CHUNK;
    if (first + row < last) {
      float v[CHUNK];
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        v[i] = swiglu(sums[row * (BN + 4) + n + i], sums[row * (BN + 4) + HALF + n + i]);
      }
      *(device uint4*)(h + ulong(first + row) * N + column + n) = pack_chunk<T>(v);
    }
  }
