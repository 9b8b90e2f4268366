// The largest number of each row, and where it first stands; NaN is larger than all.
//
// Layout        x [rows, N]; place [rows] uint; largest [rows] float
// Grid          x: a threadgroup a row.
// Threadgroup   SIMDGROUPS simdgroups; a thread goes through every THREADS-th pack of P numbers.
// Requires      P a divisor of N.
// Compares      integers of the same order; threadgroup memory: 8 bytes a simdgroup.
METAL_FUNC uint peak_key(float x) {
  const uint bits = as_type<uint>(x), size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0xffffffffu;
  return size == 0u ? 0x80000000u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// ---- kernel ----
constexpr int THREADS = SIMDGROUPS * 32;
const ulong row = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
threadgroup uint keys[SIMDGROUPS], places[SIMDGROUPS];
uint key = 0, at = 0xffffffffu;
#pragma unroll 4
for (int i = thread_index_in_threadgroup * P; i < N; i += THREADS * P) {
  float values[P];
  load_pack<P>(x + row * N + i, values);
#pragma unroll
  for (int e = 0; e < P; e++) {
    const uint other = peak_key(values[e]);
    if (other > key) {
      key = other;
      at = i + e;
    }
  }
}
const uint top = simd_max(key), first = simd_min(key == top ? at : 0xffffffffu);
if (lane == 0) {
  keys[simdgroup_index_in_threadgroup] = top;
  places[simdgroup_index_in_threadgroup] = first;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup_index_in_threadgroup == 0) {
  key = int(lane) < SIMDGROUPS ? keys[lane] : 0u;
  at = int(lane) < SIMDGROUPS ? places[lane] : 0xffffffffu;
  const uint best = simd_max(key), where = simd_min(key == best ? at : 0xffffffffu);
  if (lane == 0) {
    place[row] = where;
    largest[row] = as_type<float>(best & 0x80000000u ? best ^ 0x80000000u : ~best);
  }
}
