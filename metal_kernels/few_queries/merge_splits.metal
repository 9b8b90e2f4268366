// Puts together what `few_queries` found in each split of the keys.
//
//   o = sum_s 2^(largest_s - largest) sums_s / sum_s 2^(largest_s - largest) total_s
//
// Layout        parts [B, HQ, N, splits, D + 2]: sums of v, largest score, sum of weights;  o [B, N, HQ D]
// Grid          x: one threadgroup for each b, head and query.
// Threadgroup   SIMDGROUPS simdgroups share out the splits and meet in threadgroup memory (4 SIMDGROUPS D bytes); a lane owns
//               D / 32 columns.
// Requires      D a multiple of 32.
// ---- kernel ----
constexpr int COLUMNS = D / 32, THREADS = SIMDGROUPS * 32;
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int row = threadgroup_position_in_grid.x, splits = parts_shape[3];
const int t = row % N, head = row / N % HQ, b = row / (N * HQ);
const device float* part = parts + ulong(row) * splits * (D + 2);
threadgroup float shared[SIMDGROUPS * D];

float largest = -1e30f, total = 0;
for (int s = lane; s < splits; s += 32) largest = metal::max(largest, part[s * (D + 2) + D]);
largest = simd_max(largest);
for (int s = lane; s < splits; s += 32) {
  total += part[s * (D + 2) + D + 1] * metal::exp2(part[s * (D + 2) + D] - largest);
}
total = simd_sum(total);
float sums[COLUMNS];
#pragma unroll
for (int c = 0; c < COLUMNS; c++) sums[c] = 0;
for (int s = simd; s < splits; s += SIMDGROUPS) {
  const float factor = metal::exp2(part[s * (D + 2) + D] - largest);
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) sums[c] += factor * part[s * (D + 2) + c * 32 + lane];
}
#pragma unroll
for (int c = 0; c < COLUMNS; c++) shared[simd * D + c * 32 + lane] = sums[c];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int d = thread_index_in_threadgroup; d < D; d += THREADS) {
  float sum = 0;
  for (int i = 0; i < SIMDGROUPS; i++) sum += shared[i * D + d];
  o[(ulong(b * N + t) * HQ + head) * D + d] = T(sum / total);
}
