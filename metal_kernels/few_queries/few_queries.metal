// Softmax attention of N queries a row, 1 to 8, over keys and values in a cache. Each is read once for all queries and for
// the HEADS heads of q that share it. The number of keys is read on the device, so nothing depends on it but the work.
//
//   o_i = sum_j softmax_j(scale q_i k_j) v_j,  start <= j <= i;  a query in the padding looks at itself only
//
// Layout        q [B, HQ, N, D]; k, v [B, HKV, L, D]; offset [1 or B], start [B], positions are offset + start in the cache
//               WHOLE: o [B, N, HQ D] of type O;  else parts [B, HQ, N, splits, D + 2]: sums of v, largest score, sum of
//               weights
// Grid          x: splits of the keys; y: HQ / HEADS; z: B.
// Threadgroup   SIMDGROUPS simdgroups, which share out tiles of 32 keys. For the scores 8 lanes share a key, GROUPS of 4 keys
//               at a time; for the sums a lane owns D / 32 columns. Scores of a tile lie in threadgroup memory between.
// Requires      D a multiple of 32; threadgroup memory for ROWS = HEADS N queries in float, SIMDGROUPS tiles of scores.
// Accumulates   in float32, weights relative to the largest score so far (powers of two); rounds once.

// Elements of a load of at most 16 bytes that divide `each`.
constexpr int load_size(int each, int bytes) { return each % 8 == 0 && bytes < 4 ? 8 : 4; }

// Sums of four values over each 8 lanes: value (lane / 2) % 4 in this lane.
METAL_FUNC float sum_of_four(thread const float* v, int lane) {
  const bool is_upper = lane & 4, is_second = lane & 2;
  float a = is_upper ? v[2] : v[0], b = is_upper ? v[3] : v[1];
  a += simd_shuffle_xor(is_upper ? v[0] : v[2], ushort(4));
  b += simd_shuffle_xor(is_upper ? v[1] : v[3], ushort(4));
  float sum = is_second ? b : a;
  sum += simd_shuffle_xor(is_second ? a : b, ushort(2));
  return sum + simd_shuffle_xor(sum, ushort(1));
}

// ---- kernel ----
constexpr int ROWS = HEADS * N, PADDED = (ROWS + 3) / 4 * 4, STRIDE = 36, THREADS = SIMDGROUPS * 32;
constexpr int EACH = D / 8, P = load_size(EACH, sizeof(C)), COLUMNS = D / 32;
constexpr int TOGETHER = D > 128 ? 2 : 4, OWN = metal::max(PADDED * STRIDE, TOGETHER * D);
constexpr float NONE = -1e30f, MASKED = -2e30f;
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup, index = thread_index_in_threadgroup;
const int split = threadgroup_position_in_grid.x, splits = threadgroups_per_grid.x;
const int head = threadgroup_position_in_grid.y * HEADS, b = threadgroup_position_in_grid.z;
const int length = k_shape[2];
const float scale = as_type<float>(SCALE);
const int begin = HAS_START ? start[b] : 0, before = offset[PER_ROW ? b : 0] + begin, end = before + N;
const int first = HAS_START ? metal::min(begin, before) : 0, tiles = (end - first + 31) / 32;
const ulong at = ulong(b * HKV + head / (HQ / HKV)) * length * D;

threadgroup float4 queries[PADDED * D / 4];
threadgroup float4 tile_scores[SIMDGROUPS * OWN / 4];
threadgroup float2 found[SIMDGROUPS * ROWS];
threadgroup float2 whole[ROWS];
threadgroup float* const scores = (threadgroup float*)tile_scores + simd * OWN;

for (int i = index; i < PADDED * D; i += THREADS) {
  const int d = i % D, m = d / P / 8 * P + d % P;  // the lanes that share a key read neighbouring packs
  const float value = i < ROWS * D ? float(q[ulong(b * HQ + head) * (N * D) + i]) * scale : 0.0f;
  ((threadgroup float*)queries)[i - d + (m / 4 * 8 + d / P % 8) * 4 + m % 4] = value;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float sums[ROWS * COLUMNS], most[ROWS], total[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  most[r] = NONE;
  total[r] = 0;
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] = 0;
}
for (int tile = split * SIMDGROUPS + simd; tile < tiles; tile += splits * SIMDGROUPS) {
  const int from = first + tile * 32;
  for (int n = 0; n < 32 && from + n < end; n += 4 * GROUPS) {
    float keys[GROUPS * EACH];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      const int key = metal::min(from + n + g * 4 + lane / 8, end - 1);
#pragma unroll
      for (int i = 0; i < EACH; i += P) load_pack<P>(k + at + ulong(key) * D + i * 8 + lane % 8 * P, keys + g * EACH + i);
    }
#pragma unroll
    for (int r = 0; r < PADDED; r += 4) {
      float dots[GROUPS * 4];
#pragma unroll
      for (int i = 0; i < GROUPS * 4; i++) dots[i] = 0;
#pragma unroll
      for (int m = 0; m < EACH; m += 4) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float4 x = queries[(r + e) * (D / 4) + m * 2 + lane % 8];
#pragma unroll
          for (int g = 0; g < GROUPS; g++) {
            thread const float* key = keys + g * EACH + m;
            dots[g * 4 + e] += x.x * key[0] + x.y * key[1] + x.z * key[2] + x.w * key[3];
          }
        }
      }
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        const float sum = sum_of_four(dots + g * 4, lane);
        if (lane % 2 == 0) scores[(r + lane / 2 % 4) * STRIDE + n + g * 4 + lane / 8] = sum;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int key = from + lane, own = before + r % N;
    const bool is_seen = key <= own && (!HAS_START || key >= begin || key == own);
    const float score = is_seen ? scores[r * STRIDE + lane] : MASKED;
    const float now = metal::max(most[r], simd_max(score)), kept = metal::exp2(most[r] - now);
    const float weight = metal::exp2(score - now);
    most[r] = now;
    total[r] = total[r] * kept + weight;
    scores[r * STRIDE + lane] = weight;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] *= kept;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = 0; n < 32 && from + n < end; n += 8) {
    float values[8 * COLUMNS];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int key = metal::min(from + n + e, end - 1);
      load_pack<COLUMNS>(v + at + ulong(key) * D + lane * COLUMNS, values + e * COLUMNS);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float4 weight = *(const threadgroup float4*)(scores + r * STRIDE + n + e);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          thread const float* value = values + e * COLUMNS + c;
          sums[r * COLUMNS + c] += weight.x * value[0] + weight.y * value[COLUMNS] + weight.z * value[2 * COLUMNS] +
                                   weight.w * value[3 * COLUMNS];
        }
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float sum = simd_sum(total[r]);
  if (lane == 0) found[simd * ROWS + r] = float2(most[r], sum);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int r = index; r < ROWS; r += THREADS) {
  float largest = NONE, sum = 0;
  for (int i = 0; i < SIMDGROUPS; i++) largest = metal::max(largest, found[i * ROWS + r].x);
  for (int i = 0; i < SIMDGROUPS; i++) sum += found[i * ROWS + r].y * metal::exp2(found[i * ROWS + r].x - largest);
  whole[r] = float2(largest, sum);
}
#pragma unroll
for (int from = 0; from < ROWS; from += TOGETHER) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int r = from; r < from + TOGETHER && r < ROWS; r++) {
    const float factor = metal::exp2(most[r] - whole[r].x);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      scores[(r - from) * D + lane * COLUMNS + c] = sums[r * COLUMNS + c] * factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = index; i < metal::min(TOGETHER, ROWS - from) * D; i += THREADS) {
    const int r = from + i / D, d = i % D, own_head = head + r / N, t = r % N;
    float sum = 0;
    for (int j = 0; j < SIMDGROUPS; j++) sum += ((const threadgroup float*)tile_scores)[j * OWN + i];
    if (WHOLE) {
      o[(ulong(b * N + t) * HQ + own_head) * D + d] = O(sum / whole[r].y);
    } else {
      const ulong part = (ulong(b * HQ + own_head) * N + t) * splits + split;
      o[part * (D + 2) + d] = O(sum);
      if (d < 2) o[part * (D + 2) + D + d] = O(d == 0 ? whole[r].x : whole[r].y);
    }
  }
}
