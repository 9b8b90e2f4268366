// Two sums, one below the other: d0 += a[0] b0 + a[1] b1, d1 += a[2] b0 + a[3] b1. That is one 16x8x16 instruction of a
// tensor core, which the CUDA twin may offer under this name.
template <typename T>
METAL_FUNC void multiply_tall(thread simdgroup_matrix<float, 8, 8>* d0, thread simdgroup_matrix<float, 8, 8>* d1,
                              thread const simdgroup_matrix<T, 8, 8>* a, simdgroup_matrix<T, 8, 8> b0,
                              simdgroup_matrix<T, 8, 8> b1) {
#ifdef MSL_MULTIPLY_16X8X16
  if constexpr (sizeof(T) == 2) {
    MSL_MULTIPLY_16X8X16(*d0, *d1, a[0], a[1], a[2], a[3], b0, b1);
    return;
  }
#endif
  simdgroup_multiply_accumulate(*d0, a[0], b0, *d0);
  simdgroup_multiply_accumulate(*d1, a[2], b0, *d1);
  simdgroup_multiply_accumulate(*d0, a[1], b1, *d0);
  simdgroup_multiply_accumulate(*d1, a[3], b1, *d1);
}
