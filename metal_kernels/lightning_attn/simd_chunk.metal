// Lightning attention over many tokens, C at a time, in products of 8 x 8 simdgroup matrices.
//
// With c_i the number of counted tokens of a chunk up to and with i, and P the state before the chunk:
//
//   o_i = scale * ( sum_{j <= i} exp(-s (c_i - c_j)) (q_i k_j) v_j  +  exp(-s c_i) q_i P )
//   P' = exp(-s c_last) P + sum_j exp(-s (c_last - c_j)) k_j v_j^T
//
// Layout        q, k [B, H, T, K]; v [B, H, T, V]; state [B, H, K, V]; o [B, T, H, V]
// Grid          x: one threadgroup for each row b, head h and slice of 8 TILES SIMDGROUPS columns of V; y: segments of
//               the tokens, 1 unless SEGMENTED. A segment starts from `state` and the `updates` of those before it.
// Threadgroup   SIMDGROUPS simdgroups. Each owns 8 TILES columns: of the state, [K, 8 TILES] floats in registers from
//               the first chunk to the last, of v and of o. The tiles of q k^T are shared out among them.
// Requires      T float, half or bfloat; M, the type of a product's operands, float or T; K a multiple of 32, V of
//               8 TILES SIMDGROUPS; C 8, 16 or 32; a segment a multiple of C; a grid of whole threadgroups.
//               BLOCK x BLOCK tiles of a left operand go into a product at a time: 1, or 2 where the machine has one so
//               large and C is a multiple of 16.
// Accumulates   in float32. Where M is narrower than float, what is not exact in it (state, decayed scores, decayed v)
//               goes through the products as PARTS summands, so that no product is less exact than float32's.
//               Threadgroup memory: q and k, C (K + pad) T each; v, C (columns + pad) T; scores, 4 C (C + 4) bytes.

// ---- kernel ----
constexpr int COLUMNS = SIMDGROUPS * TILES * 8;
constexpr int SLICES = V / COLUMNS;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int PAD = 16 / sizeof(T);
constexpr int QK_PITCH = K + PAD;
constexpr int V_PITCH = COLUMNS + PAD;
constexpr int S_PITCH = C + 4;
constexpr int BLOCKS = C / 8 / BLOCK;
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int thread_index = thread_index_in_threadgroup;
const int H = q_shape[1], tokens = q_shape[2];
const int slice = threadgroup_position_in_grid.x % SLICES;
const int bh = threadgroup_position_in_grid.x / SLICES;
const int b = bh / H, h = bh % H;
const int segment = threadgroup_position_in_grid.y, segments = threadgroups_per_grid.y;
const int begin = SEGMENTED ? segment * sizes[0] : 0;
const int end = SEGMENTED ? metal::min(begin + sizes[0], tokens) : tokens;
const float rate = decay_rate[h], scale = as_type<float>(SCALE);

threadgroup vec<T, 4> query_rows[C * QK_PITCH / 4];
threadgroup vec<T, 4> key_rows[C * QK_PITCH / 4];
threadgroup vec<T, 4> value_rows[C * V_PITCH / 4];
threadgroup float2 score_rows[C * S_PITCH / 2];
threadgroup int counts[C];
threadgroup float carried[C], kept[C], index[64];
threadgroup T* queries = (threadgroup T*)query_rows;
threadgroup T* keys = (threadgroup T*)key_rows;
threadgroup T* values = (threadgroup T*)value_rows;
threadgroup float* scores = (threadgroup float*)score_rows;

for (int i = thread_index; i < 64; i += THREADS) index[i] = i;
threadgroup_barrier(mem_flags::mem_threadgroup);
const Place place = place_in_tile(index);
const int own = simd * TILES * 8;  // this simdgroup's first column of the slice
const ulong corner = ulong(place.row) * V + slice * COLUMNS + own + place.column;  // this lane's place in the state

State<K, TILES> S;
S.clear();
if (HAS_STATE) S.add(state + ulong(bh) * K * V + corner, V);
if (SEGMENTED) {
  for (int n = 0; n < segment; n++) {
    const int before = bh * (segments - 1) + n;
    S.scale(metal::precise::exp(-rate * update_counts[before]));
    S.add(updates + ulong(before) * K * V + corner, V);
  }
}

for (int start = begin; start < end; start += C) {
  const int left = metal::min(C, end - start);
  const ulong first = ulong(bh) * tokens + start;
  const int first_flag = HAS_MASK ? b * tokens + start : 0;
  load_rows<T, C, K, THREADS, false>(q + first * K, K, mask, left, queries, QK_PITCH, thread_index);
  load_rows<T, C, K, THREADS, HAS_MASK>(k + first * K, K, mask + first_flag, left, keys, QK_PITCH, thread_index);
  load_rows<T, C, COLUMNS, THREADS, HAS_MASK>(v + first * V + slice * COLUMNS, V, mask + first_flag, left, values,
                                              V_PITCH, thread_index);
  if (simd == 0) {
    const bool is_counted = lane < left && (!HAS_MASK || mask[first_flag + lane]);
    count_tokens(is_counted, rate, C, lane, counts, carried, kept);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // q k^T with its decay, where it is on or below the diagonal: BLOCK tiles of rows and one of columns at a time.
  for (int n = simd; n < BLOCK * BLOCKS * (BLOCKS + 1) / 2; n += SIMDGROUPS) {
    int block = 0;
    while (BLOCK * (block + 1) * (block + 2) / 2 <= n) block++;
    const int i = block * BLOCK, j = n - BLOCK * block * (block + 1) / 2;
    Accumulator sum[BLOCK];
#pragma unroll
    for (int m = 0; m < BLOCK; m++) sum[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
#pragma unroll
    for (int d = 0; d < K / 8; d += BLOCK) {
      simdgroup_matrix<M, 8, 8> q_tiles[BLOCK * BLOCK], k_tiles[BLOCK];
#pragma unroll
      for (int m = 0; m < BLOCK * BLOCK; m++) {
        const threadgroup T* first_q = queries + (i + m / BLOCK) * 8 * QK_PITCH + (d + m % BLOCK) * 8;
        q_tiles[m] = Tile<M, T>::load(first_q, QK_PITCH, place);
      }
#pragma unroll
      for (int m = 0; m < BLOCK; m++) {
        k_tiles[m] = Tile<M, T>::load_transposed(keys + j * 8 * QK_PITCH + (d + m) * 8, QK_PITCH, place);
      }
      Product<BLOCK>::template add<M>(sum[0], sum[BLOCK - 1], q_tiles, k_tiles);
    }
#pragma unroll
    for (int m = 0; m < BLOCK; m++) {
      const int row = (i + m) * 8 + place.row, column = j * 8 + place.column;
      float2 score = float2(0.0f);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float decay = metal::precise::exp(-rate * metal::max(counts[row] - counts[column + e], 0));
        if (column + e <= row) score[e] = sum[m].thread_elements()[e] * decay;
      }
      *(threadgroup float2*)(scores + row * S_PITCH + column) = score;
    }
  }

  // exp(-s c_i) q_i P.
  Accumulator out[C / 8][TILES];
#pragma unroll
  for (int i = 0; i < C / 8; i++) {
#pragma unroll
    for (int c = 0; c < TILES; c++) out[i][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
#pragma unroll
  for (int d = 0; d < K / 8; d += BLOCK) {
    Split<M, PARTS, BLOCK> own_state[TILES];
#pragma unroll
    for (int n = 0; n < BLOCK; n++) {
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        own_state[c].set(n, S.tiles[d + n][c].thread_elements()[0], S.tiles[d + n][c].thread_elements()[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < C / 8; i += BLOCK) {
      simdgroup_matrix<M, 8, 8> q_tiles[BLOCK * BLOCK];
#pragma unroll
      for (int m = 0; m < BLOCK * BLOCK; m++) {
        const threadgroup T* first_q = queries + (i + m / BLOCK) * 8 * QK_PITCH + (d + m % BLOCK) * 8;
        q_tiles[m] = Tile<M, T>::load(first_q, QK_PITCH, place);
      }
#pragma unroll
      for (int c = 0; c < TILES; c++) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          Product<BLOCK>::template add<M>(out[i][c], out[i + BLOCK - 1][c], q_tiles, own_state[c].part[p]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < C / 8; i++) {
    const float factor = carried[i * 8 + place.row];
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      out[i][c].thread_elements()[0] *= factor;
      out[i][c].thread_elements()[1] *= factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The decayed scores times v.
#pragma unroll
  for (int j = 0; j < C / 8; j += BLOCK) {
    simdgroup_matrix<M, 8, 8> v_tiles[TILES][BLOCK];
#pragma unroll
    for (int c = 0; c < TILES; c++) {
#pragma unroll
      for (int n = 0; n < BLOCK; n++) {
        v_tiles[c][n] = Tile<M, T>::load(values + (j + n) * 8 * V_PITCH + own + c * 8, V_PITCH, place);
      }
    }
#pragma unroll
    for (int i = j; i < C / 8; i += BLOCK) {
      Split<M, PARTS, BLOCK * BLOCK> decayed;
#pragma unroll
      for (int m = 0; m < BLOCK * BLOCK; m++) {
        const int row = (i + m / BLOCK) * 8 + place.row, column = (j + m % BLOCK) * 8 + place.column;
        const float2 e = *(const threadgroup float2*)(scores + row * S_PITCH + column);
        decayed.set(m, e.x, e.y);
      }
#pragma unroll
      for (int c = 0; c < TILES; c++) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          Product<BLOCK>::template add<M>(out[i][c], out[i + BLOCK - 1][c], decayed.part[p], v_tiles[c]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < C / 8; i++) {
    const int row = i * 8 + place.row;
    if (row < left) {
      device T* to = o + ((ulong(b) * tokens + start + row) * H + h) * V + slice * COLUMNS + own + place.column;
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        *(device vec<T, 2>*)(to + c * 8) =
            vec<T, 2>(T(scale * out[i][c].thread_elements()[0]), T(scale * out[i][c].thread_elements()[1]));
      }
    }
  }
  S.template update<M, PARTS, BLOCK, C>(keys, QK_PITCH, values + own, V_PITCH, carried, kept, place);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (segment == segments - 1) S.store(new_state + ulong(bh) * K * V + corner, V);
