// QK-norm, partial rotary embedding and split: from the fused projection to q, k and v by heads, for any T.
//
//   y = x / sqrt(mean(x^2) + eps) * weight,  y[:R] = rope_scale * rotation by position * inv_freq,  v is copied
//
// Layout        qkv [B, T, (HQ + 2 HKV) * D]  ->  q [B, HQ, T, D], k and v [B, HKV, T, D]
// Grid          x: one threadgroup a token (b, t); y: its heads, SIMDGROUPS at a time.
// Threadgroup   SIMDGROUPS simdgroups; the first R / 2 threads make the token's table of rotations in threadgroup
//               memory (8 R / 2 bytes), then each simdgroup owns one head of D elements, P adjacent ones a lane.
// Requires      D a multiple of 32, R even and at most D; a grid of whole threadgroups.
// Accumulates   in float32; rounds once, on the way out.

// ---- kernel ----
constexpr int P = pack_size(D, R);
const uint lane = thread_index_in_simdgroup;
const int tokens = qkv_shape[1];
const int token = threadgroup_position_in_grid.x;
const int b = token / tokens, t = token % tokens;
const int head = threadgroup_position_in_grid.y * SIMDGROUPS + simdgroup_index_in_threadgroup;
const float eps = as_type<float>(EPS), rope_scale = as_type<float>(ROPE_SCALE);

threadgroup float2 rotation[R / 2];
const float position = float(offset[PER_ROW ? b : 0] + t);
for (int p = thread_index_in_threadgroup; p < R / 2; p += SIMDGROUPS * 32) {
  const float angle = position * inv_freq[p];
  rotation[p] = float2(rope_scale * metal::precise::cos(angle), rope_scale * metal::precise::sin(angle));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (head < HQ + 2 * HKV) {
  const device T* x = qkv + (ulong(token) * (HQ + 2 * HKV) + head) * D;
  const bool is_query = head < HQ, is_value = head >= HQ + HKV;
  const int own_head = is_query ? head : is_value ? head - HQ - HKV : head - HQ;
  device T* y = is_query ? q : is_value ? v : k;
  y += ((ulong(b) * (is_query ? HQ : HKV) + own_head) * tokens + t) * D;
  const device W* weight = is_query ? q_weight : k_weight;
  const bool is_normed = NORM && !is_value;
  float values[D / 32];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < D / 32; i += P) {
    load_pack<P>(x + (i * 32 + int(lane) * P), values + i);
#pragma unroll
    for (int e = 0; e < P; e++) sum += values[i + e] * values[i + e];
  }
  const float inverse = is_normed ? metal::precise::rsqrt(simd_sum(sum) / D + eps) : 1.0f;
#pragma unroll
  for (int i = 0; i < D / 32; i += P) {
    const int d = i * 32 + int(lane) * P;
    const bool is_first = d < R / 2;
    const int other = is_first ? d + R / 2 : d - R / 2;
    const bool is_rotated = d < R && !is_value;
    float factors[P], partner[P], partner_factors[P];
    if (is_normed) load_pack<P>(weight + d, factors);
    if (is_rotated) load_pack<P>(x + other, partner);
    if (is_rotated && is_normed) load_pack<P>(weight + other, partner_factors);
#pragma unroll
    for (int e = 0; e < P; e++) {
      float a = values[i + e] * inverse;
      if (is_normed) a *= factors[e];
      if (is_rotated) {
        float c = partner[e] * inverse;
        if (is_normed) c *= partner_factors[e];
        const float2 turn = rotation[(is_first ? d : other) + e];
        a = is_first ? a * turn.x - c * turn.y : a * turn.x + c * turn.y;
      }
      values[i + e] = a;
    }
    store_pack<P>(y + d, values + i);
  }
}
