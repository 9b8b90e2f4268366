// The twin's instructions on the simulator's runtime: takes the place of metal_kernels/twin/cuda/ptx.cuh.
// The fragment layouts of mma and movmatrix are written here from NVIDIA's PTX manual, apart from the shim.
#pragma once
#include "cuda_builtins.h"

#define MSL_FN inline __attribute__((always_inline))

namespace msl {

MSL_FN unsigned short ptx_half_from_float(float x) { return __builtin_bit_cast(unsigned short, (_Float16)x); }
MSL_FN float ptx_float_from_half(unsigned short h) { return (float)__builtin_bit_cast(_Float16, h); }
MSL_FN unsigned short ptx_bfloat_from_float(float x) {
  unsigned bits = __builtin_bit_cast(unsigned, x);
  if (x != x) return 0x7fff;
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MSL_FN unsigned ptx_lane() { return msl_self->lane; }

MSL_FN unsigned short ptx_element(unsigned pair, int i) { return (unsigned short)(i ? pair >> 16 : pair); }

MSL_FN unsigned ptx_transpose(unsigned tile) {
  int row = ptx_lane() / 4, pair = ptx_lane() % 4;
  unsigned low = __shfl_sync(~0u, tile, 2 * pair * 4 + row / 2);
  unsigned high = __shfl_sync(~0u, tile, (2 * pair + 1) * 4 + row / 2);
  return ptx_element(low, row % 2) | (unsigned)ptx_element(high, row % 2) << 16;
}

// Of m16n8k8 the upper eight rows. Group g = lane / 4 and t = lane % 4: A holds (g, 2 t..), B (2 t.., g), C (g, 2 t..).
#define MSL_HOST_MMA(name, to_float)                                                                        \
  MSL_FN void name(float& d0, float& d1, unsigned a, unsigned b, float c0, float c1) {                      \
    int g = ptx_lane() / 4, t = ptx_lane() % 4;                                                             \
    for (int k = 0; k < 8; k++) {                                                                           \
      float left = to_float(ptx_element(__shfl_sync(~0u, a, g * 4 + k / 2), k % 2));                        \
      float right0 = to_float(ptx_element(__shfl_sync(~0u, b, 2 * t * 4 + k / 2), k % 2));                  \
      float right1 = to_float(ptx_element(__shfl_sync(~0u, b, (2 * t + 1) * 4 + k / 2), k % 2));            \
      c0 += left * right0;                                                                                  \
      c1 += left * right1;                                                                                  \
    }                                                                                                       \
    d0 = c0;                                                                                                \
    d1 = c1;                                                                                                \
  }                                                                                                         \
  /* m16n8k16: A is (g, 2 t..), (g + 8, 2 t..), (g, 2 t + 8..), (g + 8, 2 t + 8..); B (2 t.., g), (2 t + 8.., g). */ \
  MSL_FN void name##_tall(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) { \
    name(d[0], d[1], a0, b0, d[0], d[1]);                                                                   \
    name(d[0], d[1], a1, b1, d[0], d[1]);                                                                   \
    name(d[2], d[3], a2, b0, d[2], d[3]);                                                                   \
    name(d[2], d[3], a3, b1, d[2], d[3]);                                                                   \
  }
MSL_FN float ptx_float_from_bfloat(unsigned short b) { return __builtin_bit_cast(float, (unsigned)b << 16); }
MSL_HOST_MMA(ptx_mma_half, ptx_float_from_half)
MSL_HOST_MMA(ptx_mma_bfloat, ptx_float_from_bfloat)

}  // namespace msl
