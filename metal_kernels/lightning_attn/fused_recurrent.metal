// Lightning attention of a decode step: norm, rotation, state update and readout of N tokens, one pass over the state.
//
//   q_t, k_t = rotation by position of x / sqrt(mean(x^2) + eps) * weight
//   S_t = exp(-s) S_{t-1} + k_t v_t^T  (S_{t-1} where masked),  o_t = scale q_t S_t
//
// Layout        qkv [B, N, 3 H D], rows [Q | K | V]; state [B, H, D, D], rows of K; o [B, N, H D]; new_state as state, or
//               with EACH [N, B, H, D, D], that after each token
// Grid          x: one threadgroup for each row b, head h and slice of COLUMNS columns of V: B H D / COLUMNS of them.
// Threadgroup   SIMDGROUPS simdgroups. Each thread owns 4 adjacent columns of every ROWS-th row of the slice, in
//               registers from the one read to the one write. Each simdgroup normalises and rotates whole heads of
//               q and k into threadgroup memory while the state is under way.
// Requires      D a multiple of ROWS, R even and at most D; a grid of whole threadgroups.
// Accumulates   in float32; rounds only o. Threadgroup memory: 4 N (2 D + SIMDGROUPS COLUMNS) bytes.

// One head of D elements into `out`: P adjacent ones of every 32 P by each lane.
template <typename T, typename W, int D, int R, bool NORM, typename Frequencies>
METAL_FUNC void normalise_and_rotate(const device T* x, const device W* weight, Frequencies inv_freq, float position,
                                     float rope_scale, float eps, int lane, threadgroup float* out) {
  constexpr int P = pack_size(D, R);
  float values[D / 32];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < D / 32; i += P) {
    load_pack<P>(x + (i * 32 + lane * P), values + i);
#pragma unroll
    for (int e = 0; e < P; e++) sum += values[i + e] * values[i + e];
  }
  const float inverse = NORM ? metal::precise::rsqrt(simd_sum(sum) / D + eps) : 1.0f;
#pragma unroll
  for (int i = 0; i < D / 32; i += P) {
    const int d = i * 32 + lane * P;
    const bool is_first = d < R / 2, is_rotated = d < R;
    const int other = is_first ? d + R / 2 : d - R / 2;
    float factors[P], partner[P], partner_factors[P];
    if (NORM) load_pack<P>(weight + d, factors);
    if (is_rotated) load_pack<P>(x + other, partner);
    if (NORM && is_rotated) load_pack<P>(weight + other, partner_factors);
#pragma unroll
    for (int e = 0; e < P; e++) {
      float a = values[i + e] * inverse;
      if (NORM) a *= factors[e];
      if (is_rotated) {
        float c = partner[e] * inverse;
        if (NORM) c *= partner_factors[e];
        const float angle = position * inv_freq[(is_first ? d : other) + e];
        const float turned = c * metal::precise::sin(angle);
        a = rope_scale * (a * metal::precise::cos(angle) + (is_first ? -turned : turned));
      }
      out[d + e] = a;
    }
  }
}

// ---- kernel ----
constexpr int SLICES = D / COLUMNS;
constexpr int LANES = COLUMNS / 4;
constexpr int ROWS = 32 / LANES * SIMDGROUPS;
constexpr int STEPS = D / ROWS;
const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const int slice = threadgroup_position_in_grid.x % SLICES;
const int h = threadgroup_position_in_grid.x / SLICES % H;
const int b = threadgroup_position_in_grid.x / (SLICES * H);
const int row = simd * (32 / LANES) + lane / LANES;
const int column = slice * COLUMNS + lane % LANES * 4;
const ulong first = (ulong(b * H + h) * D + row) * D + column;
const ulong states = ulong(threadgroups_per_grid.x / SLICES) * (D * D);
const float scale = as_type<float>(SCALE), eps = as_type<float>(EPS), rope_scale = as_type<float>(ROPE_SCALE);

threadgroup float heads[2 * N * D];
threadgroup float partial[N * SIMDGROUPS * COLUMNS];

float4 S[STEPS];
#pragma unroll
for (int i = 0; i < STEPS; i++) {
  S[i] = float4(0.0f);
  if (HAS_STATE) S[i] = *(const device float4*)(state + first + i * (ROWS * D));
}
float4 v[N];
#pragma unroll
for (int t = 0; t < N; t++) {
  const device T* values = qkv + ulong(b * N + t) * (3 * H * D) + (2 * H + h) * D;
  const device vec<T, 4>& x = *(const device vec<T, 4>*)(values + column);
  v[t] = float4(float(x.x), float(x.y), float(x.z), float(x.w));
}
for (int n = simd; n < 2 * N; n += SIMDGROUPS) {
  const int t = n / 2;
  const bool is_key = n % 2 == 1;
  const device T* x = qkv + ulong(b * N + t) * (3 * H * D) + (is_key ? H + h : h) * D;
  normalise_and_rotate<T, W, D, R, NORM>(x, is_key ? k_weight : q_weight, inv_freq,
                                         float(offset[PER_ROW ? b : 0] + t), rope_scale, eps, lane, heads + n * D);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const float decay = metal::precise::exp(-decay_rate[h]);
#pragma unroll
for (int t = 0; t < N; t++) {
  const threadgroup float* query = heads + 2 * t * D + row;
  const threadgroup float* key = query + D;
  if (!HAS_MASK || mask[b * N + t]) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) S[i] = S[i] * decay + v[t] * key[i * ROWS];
  }
  if (EACH || t == N - 1) {
    device float* const to = new_state + (EACH ? t * states : 0) + first;
#pragma unroll
    for (int i = 0; i < STEPS; i++) *(device float4*)(to + i * (ROWS * D)) = S[i];
  }
  float4 sum = float4(0.0f);
#pragma unroll
  for (int i = 0; i < STEPS; i++) sum += S[i] * query[i * ROWS];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float one = sum[e];
    for (int far = LANES; far < 32; far *= 2) one += simd_shuffle_xor(one, ushort(far));
    if (lane < LANES) partial[(t * SIMDGROUPS + simd) * COLUMNS + lane * 4 + e] = one;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int n = thread_index_in_threadgroup; n < N * COLUMNS; n += SIMDGROUPS * 32) {
  const int t = n / COLUMNS, c = n % COLUMNS;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < SIMDGROUPS; i++) sum += partial[(t * SIMDGROUPS + i) * COLUMNS + c];
  o[ulong(b * N + t) * (H * D) + h * D + slice * COLUMNS + c] = T(scale * sum);
}
