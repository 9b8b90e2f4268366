// First pass of the time-parallel form: what each segment of the tokens but the last adds to a state of zero.
//
//   U_n = sum_j exp(-s (e_n - c_j)) k_j v_j^T over the tokens of segment n, with e_n the number of counted ones
//
// The second pass, simd_chunk, starts segment n from exp(-s e) of the state and of the U of the segments before.
//
// Layout        k [B, H, T, K]; v [B, H, T, V]; updates [B, H, segments - 1, K, V]; update_counts [B, H, segments - 1]
// Grid          x: one threadgroup for each row b, head h and slice of 8 TILES SIMDGROUPS columns of V; y: segments.
// Threadgroup   SIMDGROUPS simdgroups, each the owner of [K, 8 TILES] floats of U in registers.
// Requires      as simd_chunk.
// Accumulates   in float32, as simd_chunk.

// ---- kernel ----
constexpr int COLUMNS = SIMDGROUPS * TILES * 8;
constexpr int SLICES = V / COLUMNS;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int PAD = 16 / sizeof(T);
constexpr int K_PITCH = K + PAD;
constexpr int V_PITCH = COLUMNS + PAD;
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int thread_index = thread_index_in_threadgroup;
const int H = k_shape[1], tokens = k_shape[2];
const int slice = threadgroup_position_in_grid.x % SLICES;
const int bh = threadgroup_position_in_grid.x / SLICES;
const int b = bh / H, h = bh % H;
const int begin = threadgroup_position_in_grid.y * sizes[0], end = begin + sizes[0];
const float rate = decay_rate[h];

threadgroup vec<T, 4> key_rows[C * K_PITCH / 4];
threadgroup vec<T, 4> value_rows[C * V_PITCH / 4];
threadgroup int counts[C];
threadgroup float carried[C], kept[C], index[64];
threadgroup T* keys = (threadgroup T*)key_rows;
threadgroup T* values = (threadgroup T*)value_rows;

for (int i = thread_index; i < 64; i += THREADS) index[i] = i;
threadgroup_barrier(mem_flags::mem_threadgroup);
const Place place = place_in_tile(index);
const int own = simd * TILES * 8;
State<K, TILES> S;
S.clear();
int counted = 0;

for (int start = begin; start < end; start += C) {
  const ulong first = ulong(bh) * tokens + start;
  const int first_flag = HAS_MASK ? b * tokens + start : 0;
  load_rows<T, C, K, THREADS, HAS_MASK>(k + first * K, K, mask + first_flag, C, keys, K_PITCH, thread_index);
  load_rows<T, C, COLUMNS, THREADS, HAS_MASK>(v + first * V + slice * COLUMNS, V, mask + first_flag, C, values, V_PITCH,
                                              thread_index);
  if (simd == 0) {
    const bool is_counted = lane < C && (!HAS_MASK || mask[first_flag + lane]);
    count_tokens(is_counted, rate, C, lane, counts, carried, kept);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  counted += counts[C - 1];
  S.template update<M, PARTS, BLOCK, C>(keys, K_PITCH, values + own, V_PITCH, carried, kept, place);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
const int at = bh * int(threadgroups_per_grid.y) + int(threadgroup_position_in_grid.y);
S.store(updates + ulong(at) * K * V + ulong(place.row) * V + slice * COLUMNS + own + place.column, V);
if (slice == 0 && thread_index == 0) update_counts[at] = counted;
