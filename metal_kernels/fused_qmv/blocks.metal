// One block of STEP values of a row times the same of x, both in registers: what codes.metal does from device memory.
// Affine codes of 4 and 8 bits are multiplied in place in their words, scale and bias once a block; see there.

template <int NW>
METAL_FUNC void load_shared(const threadgroup uint* from, thread uint* words) {
  if constexpr (NW % 4 == 0) {
#pragma unroll
    for (int i = 0; i < NW / 4; i++) {
      const uint4 v = ((const threadgroup uint4*)from)[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < NW; i++) words[i] = from[i];
  }
}

// STEP values of type O from threadgroup memory, as `block_dot` wants them; zeros where the row has ended.
template <int MODE, int BITS, int STEP, typename O>
METAL_FUNC XBlock<STEP> shared_x(const threadgroup uint* from, bool is_inside) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  XBlock<STEP> block;
  uint words[STEP * sizeof(O) / 4];
  load_shared<STEP * sizeof(O) / 4>(from, words);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    block.x[i] = is_inside ? code<0, sizeof(O) * 8, O>(words, i) : 0.0f;
    if (sums_codes<MODE, BITS>()) {
      sums[i % 4] += block.x[i];
      block.x[i] *= 1.0f / float(1u << (i * BITS % 32));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) block.start[i] = -CENTRE * sums[i];
  block.total = sum4(sums);
  return block;
}

template <int MODE, int BITS, int STEP, typename W>
METAL_FUNC float block_dot(thread const uint* words, float scale, float bias, thread const XBlock<STEP>& block) {
  constexpr float CENTRE = 1 << (BITS < 16 ? BITS - 1 : 0);
  float parts[4];
#pragma unroll
  for (int i = 0; i < 4; i++) parts[i] = block.start[i];
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    if constexpr (sums_codes<MODE, BITS>()) {
      parts[i % 4] += block.x[i] * float(words[i * BITS / 32] & (((1u << BITS) - 1u) << (i * BITS % 32)));
    } else {
      const float q = code<MODE, BITS, W>(words, i);
      parts[i % 4] += block.x[i] * (MODE == 1 ? scale * q + bias : q);
    }
  }
  if constexpr (sums_codes<MODE, BITS>()) return scale * sum4(parts) + (bias + CENTRE * scale) * block.total;
  return MODE == 2 ? scale * sum4(parts) : sum4(parts);
}
