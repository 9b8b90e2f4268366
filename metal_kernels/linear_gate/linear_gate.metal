// Linear gate: RMSNorm over each group of channels, times a weight, times sigmoid(gate).
//
//   y = weight * x / sqrt(mean_group(x^2) + eps) * sigmoid(gate)
//
// Layout        x, gate and y [rows, GROUPS, SIZE]; weight [GROUPS, SIZE]
// Grid          x: 8 simdgroups a threadgroup, SIMDGROUPS of them to each (row, group), 8 / SIMDGROUPS groups in one.
// Threadgroup   Each lane owns P adjacent channels of every (32 P SIMDGROUPS)-th and keeps its x in registers.
// Requires      SIZE a multiple of P; SIMDGROUPS 1, 2, 4 or 8; a grid of whole threadgroups.
// Accumulates   in float32; rounds once. Threadgroup memory: 32 bytes, where SIMDGROUPS is more than one.

// ---- kernel ----
constexpr int STRIDE = SIMDGROUPS * 32 * P;
constexpr int STEPS = (SIZE + STRIDE - 1) / STRIDE;
const int simd = simdgroup_index_in_threadgroup;
const int unit = threadgroup_position_in_grid.x * (8 / SIMDGROUPS) + simd / SIMDGROUPS;
const bool is_live = unit < count[0];
const int own = (simd % SIMDGROUPS * 32 + int(thread_index_in_simdgroup)) * P;
const ulong first = ulong(unit) * SIZE;
const int channel = unit % GROUPS * SIZE;
const float eps = as_type<float>(EPS);

float values[STEPS * P];
float sum = 0;
#pragma unroll
for (int i = 0; i < STEPS; i++) {
  const int at = i * STRIDE + own;
  const bool is_inside = is_live && at < SIZE;
#pragma unroll
  for (int e = 0; e < P; e++) values[i * P + e] = 0;
  if (is_inside) load_pack<P>(x + first + at, values + i * P);
#pragma unroll
  for (int e = 0; e < P; e++) sum += values[i * P + e] * values[i * P + e];
}
sum = simd_sum(sum);
threadgroup float sums[8];
if (SIMDGROUPS > 1) {
  if (thread_index_in_simdgroup == 0) sums[simd] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0;
  for (int i = 0; i < SIMDGROUPS; i++) sum += sums[simd / SIMDGROUPS * SIMDGROUPS + i];
}
const float inverse = metal::precise::rsqrt(sum / SIZE + eps);
#pragma unroll
for (int i = 0; i < STEPS; i++) {
  const int at = i * STRIDE + own;
  if (is_live && at < SIZE) {
    float logits[P], factors[P];
    load_pack<P>(gate + first + at, logits);
    load_pack<P>(weight + channel + at, factors);
#pragma unroll
    for (int e = 0; e < P; e++) {
      const float opened = 1.0f / (1.0f + metal::precise::exp(-logits[e]));
      values[i * P + e] = factors[e] * (values[i * P + e] * inverse) * opened;
    }
    store_pack<P>(y + first + at, values + i * P);
  }
}
