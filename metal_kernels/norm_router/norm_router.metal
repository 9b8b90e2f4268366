// Residual, RMSNorm and the router's product for a few tokens: one dispatch for an addition, a norm, a cast, a product.
//
//   x_new = x + r,  normed = w * x_new / sqrt(mean(x_new^2) + eps),  logits = normed router^T
//
// Layout        x, r, x_new, normed [count, K]; weight [K]; router [E, K] plain or packed; logits [count, E] float32;
//               count is TOKENS, or where that is 0 one a threadgroup.
// Grid          x: tokens, EACH a threadgroup; y: rows of the router, ROWS a threadgroup. Each threadgroup norms its
//               tokens itself; those of one x share out which of them is written. E = 0: no router, one y.
// Threadgroup   THREADS: a thread owns P adjacent channels of every (THREADS P)-th, of all tokens and rows alike, so
//               that only sums go through threadgroup memory. Weights are asked for before the norm is known.
// Requires      P a divisor of K; 8 where the router is packed.
// Rounds        x_new to X; normed to T before and after the weight, as MLX's norm does, and to O as it is stored; the
//               product reads T and accumulates in float. Threadgroup memory: 4 EACH (1 + ROWS) THREADS / 32 bytes.

// P weights of a row of the router, from channel `at` on.
template <int MODE, int BITS, int GROUP, int K, int P, typename W, typename S>
METAL_FUNC void load_router(const device W* w, const device S* scales, const device S* biases, uint row, uint at,
                            thread float* to) {
  if constexpr (MODE == 0) {
    load_pack<P>(w + row * K + at, to);
  } else {
    uint words[BITS * P / 32];
    load_words<BITS * P / 32>((const device uint*)w + (row * K + at) / 32 * BITS + at % 32 * BITS / 32, words);
    const uint group = row * (K / GROUP) + at / GROUP;
    const float scale = load_scale<MODE, BITS>(scales, group), bias = MODE == 1 ? float(biases[group]) : 0.0f;
#pragma unroll
    for (int i = 0; i < P; i++) to[i] = scale * code<MODE, BITS, W>(words, i) + bias;
  }
}

// ---- kernel ----
constexpr int SIMDGROUPS = THREADS / 32, STRIDE = THREADS * P, STEPS = (K + STRIDE - 1) / STRIDE;
constexpr bool HAS_ROUTER = E > 0;
const int thread_index = thread_index_in_threadgroup, simd = simdgroup_index_in_threadgroup;
const int own = thread_index * P;
const int first_token = threadgroup_position_in_grid.x * EACH, first_row = threadgroup_position_in_grid.y * ROWS;
const float eps = as_type<float>(EPS);
const int count = TOKENS > 0 ? TOKENS : int(threadgroups_per_grid.x);
threadgroup float sums[EACH * SIMDGROUPS];
threadgroup float products[EACH * ROWS * SIMDGROUPS];

float rows[ROWS * STEPS * P], factors[STEPS * P], values[EACH * STEPS * P];
#pragma unroll
for (int i = 0; i < STEPS; i++) {
  const int at = i * STRIDE + own;
  if (HAS_ROUTER && at < K) {
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      const uint row = metal::min(first_row + n, E - 1);
      load_router<MODE, BITS, GROUP, K, P>(router_w, router_s, router_b, row, at, rows + (n * STEPS + i) * P);
    }
  }
  if (at < K) load_pack<P>(weight + at, factors + i * P);
}

#pragma unroll
for (int t = 0; t < EACH; t++) {
  const ulong token = metal::min(first_token + t, count - 1);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int at = i * STRIDE + own;
    thread float* const v = values + (t * STEPS + i) * P;
    if (at < K) {
      load_pack<P>(x + token * K + at, v);
      if (HAS_RESIDUAL) {
        float added[P];
        load_pack<P>(r + token * K + at, added);
#pragma unroll
        for (int e = 0; e < P; e++) v[e] = float(X(v[e] + float(X(added[e]))));
      }
#pragma unroll
      for (int e = 0; e < P; e++) sum += v[e] * v[e];
    }
  }
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) sums[t * SIMDGROUPS + simd] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
for (int t = 0; t < EACH; t++) {
  float sum = 0;
  for (int s = 0; s < SIMDGROUPS; s++) sum += sums[t * SIMDGROUPS + s];
  const float inverse = metal::precise::rsqrt(sum / K + eps);
  const ulong token = first_token + t;
  const bool is_writer = first_token + t < count && t % threadgroups_per_grid.y == threadgroup_position_in_grid.y;
  float dots[ROWS];
#pragma unroll
  for (int n = 0; n < ROWS; n++) dots[n] = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int at = i * STRIDE + own;
    thread float* const v = values + (t * STEPS + i) * P;
    if (at < K) {
      if (HAS_RESIDUAL && is_writer) store_pack<P>(x_new + token * K + at, v);
#pragma unroll
      for (int e = 0; e < P; e++) v[e] = float(T(float(T(v[e] * inverse)) * factors[i * P + e]));
      if (is_writer) store_pack<P>(normed + token * K + at, v);
      if (HAS_ROUTER) {
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
#pragma unroll
          for (int e = 0; e < P; e++) dots[n] += v[e] * rows[(n * STEPS + i) * P + e];
        }
      }
    }
  }
  if (HAS_ROUTER) {
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      const float dot = simd_sum(dots[n]);
      if (thread_index_in_simdgroup == 0) products[(t * ROWS + n) * SIMDGROUPS + simd] = dot;
    }
  }
}
if (HAS_ROUTER) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < EACH * ROWS; i += THREADS) {
    const int token = first_token + i / ROWS, row = first_row + i % ROWS;
    if (token < count && row < E) {
      float dot = 0;
      for (int s = 0; s < SIMDGROUPS; s++) dot += products[i * SIMDGROUPS + s];
      logits[ulong(token) * E + row] = dot;
    }
  }
}
