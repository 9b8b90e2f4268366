// y[t] = residual_t + sum_j parts[t, j], in float and in the order of the slots; rounds once.
//
// parts [T, SLOTS, N] float32;  residual [T, N] any float;  y [T, N] of type O
// Grid: x over N / 4, y over tokens; a thread owns 4 columns of a token. No threadgroup memory.
// ---- kernel ----
  const uint n = thread_position_in_grid.x * 4, token = thread_position_in_grid.y;
  float4 sum = float4(0.0f);
  for (int j = 0; j < SLOTS; j++) sum += *(const device float4*)(parts + ulong(token * SLOTS + j) * N + n);
  const ulong at = ulong(token) * N + n;
  vec<O, 4> out;
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = O(HAS_RESIDUAL ? sum[i] + float(residual[at + i]) : sum[i]);
  *(device vec<O, 4>*)(y + at) = out;
