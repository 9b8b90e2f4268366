// The instructions that CUDA C++ has no spelling for. Tests put a host version in the place of this file.
#pragma once

#define MSL_FN __device__ __forceinline__

namespace msl {

MSL_FN unsigned short ptx_half_from_float(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
MSL_FN float ptx_float_from_half(unsigned short h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
MSL_FN unsigned short ptx_bfloat_from_float(float x) {
  unsigned short b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
  return b;
}
MSL_FN unsigned ptx_lane() {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The fragments of these: lane 4 r + p holds the elements (r, 2 p) and (r, 2 p + 1) of an 8x8 tile.

// Transposes a tile of 16-bit elements.
MSL_FN unsigned ptx_transpose(unsigned tile) {
  unsigned out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(tile));
  return out;
}
// d = a b + c with b given transposed. The tensor core takes 16 rows of a: the lower eight are zero here.
#define MSL_PTX_MMA(name, type)                                                                                     \
  MSL_FN void name(float& d0, float& d1, unsigned a, unsigned b_turned, float c0, float c1) {                       \
    float unused0, unused1;                                                                                         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"  \
        : "=f"(d0), "=f"(d1), "=f"(unused0), "=f"(unused1)                                                          \
        : "r"(a), "r"(0u), "r"(b_turned), "f"(c0), "f"(c1), "f"(0.0f), "f"(0.0f));                                  \
  }                                                                                                                 \
  /* d[0..1] += a0 b0 + a1 b1 and d[2..3] += a2 b0 + a3 b1: two tiles of sums, one below the other. */              \
  MSL_FN void name##_tall(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0_turned,         \
                          unsigned b1_turned) {                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                      \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
        : "r"(a0), "r"(a2), "r"(a1), "r"(a3), "r"(b0_turned), "r"(b1_turned));                                      \
  }
MSL_PTX_MMA(ptx_mma_half, "f16")
MSL_PTX_MMA(ptx_mma_bfloat, "bf16")
#undef MSL_PTX_MMA

}  // namespace msl
