// The choice of one token's experts, for kernels that make it; they see CHOOSES_EXPERTS.
#define CHOOSES_EXPERTS

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

// One token's choice by all threads of a threadgroup; lane n of its first simdgroup gets the n-th expert and its weight.
// Threadgroup memory: biased [E], best [GROUPS].
template <int E, int TOP_K, int GROUPS, int TOPK_GROUP, int SIMDGROUPS, bool HAS_BIAS, bool NORMALIZE, typename L, typename B>
METAL_FUNC void choose(const device L* scores, const device B* bias, float factor, int thread_index, int simd, uint lane,
                       threadgroup float* biased, threadgroup float* best, thread uint& expert_of_lane,
                       thread float& weight_of_lane) {
  constexpr int SIZE = E / GROUPS, OWN = (E + 31) / 32, THREADS = SIMDGROUPS * 32;
  for (int e = thread_index; e < E; e += THREADS) biased[e] = sigmoid(scores[e]) + (HAS_BIAS ? float(bias[e]) : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (GROUPS > 1) {
    for (int g = simd; g < GROUPS; g += SIMDGROUPS) {
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

  if (simd != 0) return;
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
  expert_of_lane = own_choice;
  weight_of_lane = weight * factor;
}
