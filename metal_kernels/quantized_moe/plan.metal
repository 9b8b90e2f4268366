// Cuts the pairs (token, expert), sorted by expert, into tiles of at most BM rows of one expert, without the host.
//
// chosen [T * TOP_K] int32;  order [T * TOP_K] uint32, sorts chosen
// tiles [TOTAL / BM + min(E, TOTAL) + SHARED ceil(T / BM), 4] int32: expert, first row, last row + 1, 0 for every tile,
// in rising order, then zeros up to the bound, which holds for any choice. Rows TOTAL .. TOTAL + T are those of the
// shared expert, numbered E.
// One threadgroup. Threads share the experts and then the tiles out; 8 bytes of threadgroup memory an expert.
// ---- kernel ----
  threadgroup int starts[E + 2], tile_starts[E + 2];
  const int total = order_shape[0], tokens = total / TOP_K;
  const int thread_index = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  for (int e = thread_index; e <= E; e += threads) {
    int low = 0, high = total;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (chosen[order[middle]] < e) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    starts[e] = low;
  }
  if (thread_index == 0) starts[E + 1] = total + (SHARED ? tokens : 0);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (simdgroup_index_in_threadgroup == 0) {
    constexpr int EACH = (E + 1 + 31) / 32;
    const int own = thread_index_in_simdgroup * EACH;
    int count = 0;
    for (int e = own; e < min(own + EACH, E + 1); e++) count += (starts[e + 1] - starts[e] + BM - 1) / BM;
    int before = simd_prefix_exclusive_sum(count);
    for (int e = own; e < min(own + EACH, E + 1); e++) {
      tile_starts[e] = before;
      before += (starts[e + 1] - starts[e] + BM - 1) / BM;
    }
    if (thread_index_in_simdgroup == 31) tile_starts[E + 1] = before;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int bound = total / BM + min(E, total) + (SHARED ? (tokens + BM - 1) / BM : 0);
  for (int i = thread_index; i < bound; i += threads) {
    int low = 0, high = E + 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (tile_starts[middle + 1] <= i) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool is_used = i < tile_starts[E + 1];
    const int first = is_used ? starts[low] + (i - tile_starts[low]) * BM : 0;
    tiles[4 * i] = is_used ? low : 0;
    tiles[4 * i + 1] = first;
    tiles[4 * i + 2] = is_used ? min(first + BM, starts[low + 1]) : 0;
    tiles[4 * i + 3] = 0;
  }
