// Router: top_k experts of the best groups, and their weights.
//
//   p = sigmoid(logits),  b = p + bias,  group score = sum of the group's two largest b
//   only the TOPK_GROUP best groups stay (others: -inf); chosen = the TOP_K largest b, ties to the lower index
//   w = p[chosen] / (sum p[chosen] + 1e-20) * factor
//
// Layout        logits [tokens, E]; bias [E]; chosen and weights [tokens, TOP_K]
// Grid          x: one threadgroup a token.
// Threadgroup   SIMDGROUPS simdgroups, one for each 32 experts up to 8. A thread scores every THREADS-th expert; each
//               simdgroup scores whole groups; the first simdgroup then draws TOP_K times the largest of E, E / 32 experts
//               a lane in registers.
// Requires      E at most 1,024, GROUPS a divisor of E, TOP_K at most 32 and at most E.
// Computes      in float32. An expert is drawn by a key, its b as an integer of the same order: 0 means drawn already,
//               so that experts of dropped groups (-inf) come last, by index, should the kept ones run out.
//               Threadgroup memory: 4 (E + GROUPS) bytes.

// The sigmoid of MLX, so that scores tie here where they tie there.
METAL_FUNC float sigmoid(float x) {
  const float y = 1.0f / (1.0f + metal::precise::exp(metal::abs(x)));
  return x < 0 ? y : 1.0f - y;
}

// An integer that orders as x does, above 0.
METAL_FUNC uint order_key(float x) {
  const uint bits = as_type<uint>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum of the two largest of SIZE scores, which the lanes share.
template <int SIZE>
METAL_FUNC float two_best(const threadgroup float* scores, uint lane) {
  float first = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < SIZE; i += 32) {
    const float x = i + int(lane) < SIZE ? scores[i + lane] : -INFINITY;
    second = metal::max(second, metal::min(first, x));
    first = metal::max(first, x);
  }
  const float best = simd_max(first);
  const uint winner = simd_min(first == best ? lane : 32u);
  return SIZE == 1 ? best : best + simd_max(lane == winner ? second : first);
}

// ---- kernel ----
constexpr int SIZE = E / GROUPS;
constexpr int OWN = (E + 31) / 32, THREADS = SIMDGROUPS * 32;
const int token = threadgroup_position_in_grid.x;
const int thread_index = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const device float* scores = logits + ulong(token) * E;
threadgroup float biased[E];
threadgroup float best[GROUPS];

for (int e = thread_index; e < E; e += THREADS) biased[e] = sigmoid(scores[e]) + (HAS_BIAS ? bias[e] : 0.0f);
threadgroup_barrier(mem_flags::mem_threadgroup);

if (GROUPS > 1) {
  for (int g = simdgroup_index_in_threadgroup; g < GROUPS; g += SIMDGROUPS) {
    const float sum = two_best<SIZE>(biased + g * SIZE, lane);
    if (lane == 0) best[g] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_index; e < E; e += THREADS) {
    const int own = e / SIZE;
    int above = 0;
    for (int g = 0; g < GROUPS; g++) above += best[g] > best[own] || (best[g] == best[own] && g < own);
    if (above >= TOPK_GROUP) biased[e] = -INFINITY;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

if (simdgroup_index_in_threadgroup == 0) {
  uint keys[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int expert = i * 32 + int(lane);
    keys[i] = expert < E ? order_key(biased[expert]) : 0u;
  }
  uint own_choice = 0;
  for (int n = 0; n < TOP_K; n++) {
    uint key = keys[0], expert = lane;
#pragma unroll
    for (int i = 1; i < OWN; i++) {
      if (keys[i] > key) {
        key = keys[i];
        expert = i * 32 + lane;
      }
    }
    const uint top = simd_max(key);
    const uint drawn = simd_min(key == top ? expert : 0xffffffffu);
    if (int(lane) == n) own_choice = drawn;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (i * 32 + lane == drawn) keys[i] = 0u;
    }
  }
  float weight = int(lane) < TOP_K ? sigmoid(scores[own_choice]) : 0.0f;
  const float sum = simd_sum(weight);
  if (NORMALIZE) weight /= sum + 1e-20f;
  if (int(lane) < TOP_K) {
    chosen[ulong(token) * TOP_K + lane] = int(own_choice);
    weights[ulong(token) * TOP_K + lane] = weight * as_type<float>(SCALING);
  }
}
