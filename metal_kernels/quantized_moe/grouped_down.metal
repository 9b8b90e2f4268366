// parts[t, j] = w_tj down_e h[p], where p is the sorted place of pair (t, j): undoes the sorting as it writes, so that
// combine.metal can add up a token's parts in order. The shared expert's part is j = TOP_K, with weight 1.
//
// h [TOTAL (+ T), K] X;  order [TOTAL] uint32;  weights [TOTAL] float32;  tiles as plan.metal writes them
// down [E, N, K] packed;  shared_down [N, K] packed alike;  parts [T, SLOTS, N] float32
// Grid: x over columns, y over tiles. A threadgroup owns BM rows x BN columns; N is a multiple of 4. Sums in float.
// Threadgroup memory as grouped_gate_up.
// ---- kernel ----
  constexpr int CHUNK = 16 / sizeof(T), LD = BK + CHUNK, THREADS = 32 * WM * WN;
  constexpr int XCHUNKS = BM * (BK / CHUNK) / THREADS, MATRIX = MODE == 0 ? N * K : N * (K / 32 * BITS);
  threadgroup uint4 packs[(BM + BN) * LD / CHUNK];  // an array of T would start at a multiple of its own size only
  threadgroup T* tile = (threadgroup T*)packs;
  const uint thread_index = thread_index_in_threadgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint column = threadgroup_position_in_grid.x * BN, at = 4 * threadgroup_position_in_grid.y;
  const int total = order_shape[0], first = tiles[at + 1], last = tiles[at + 2];
  if (first >= last) return;
  const bool is_shared = first >= total;
  const ulong expert = is_shared ? 0 : tiles[at], groups = expert * (N * (K / GROUP));

  uint rows[XCHUNKS];
#pragma unroll
  for (int i = 0; i < XCHUNKS; i++) {
    rows[i] = min(first + int(thread_index + i * THREADS) / (BK / CHUNK), last - 1);
  }
  const auto w = is_shared ? shared_down_w : down_w + expert * MATRIX;
  const auto s = is_shared ? shared_down_s : down_s + groups;
  const auto b = is_shared ? shared_down_b : down_b + groups;
  simdgroup_matrix<float, 8, 8> acc[BM / WM / 8 * (BN / WN / 8)];
  grouped_product<MODE, BITS, GROUP, N, K, BM, BN, BK, WM, WN, BN>(h, rows, w, s, b, w, s, b, column, thread_index,
                                                                   simdgroup, tile, acc);

  threadgroup float* sums = (threadgroup float*)tile;
  share_sums<BM, BN, WM, WN>(acc, simdgroup, sums);
  for (int c = thread_index; c < BM * (BN / 4); c += THREADS) {
    const int row = c / (BN / 4), n = c % (BN / 4) * 4, p = first + row;
    if (p < last && column + n < N) {
      const uint pair = is_shared ? 0 : order[p];
      const float weight = is_shared ? 1.0f : weights[pair];
      const uint part = is_shared ? (p - total) * SLOTS + TOP_K : pair / TOP_K * SLOTS + pair % TOP_K;
      threadgroup const float* sum = sums + row * (BN + 4) + n;
      *(device float4*)(parts + ulong(part) * N + column + n) =
          float4(weight * sum[0], weight * sum[1], weight * sum[2], weight * sum[3]);
    }
  }
