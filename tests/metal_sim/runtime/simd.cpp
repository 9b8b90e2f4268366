// SIMD-group functions over the deposits of the lanes: reductions, scans, shuffles, votes, matrix products.
#include "state.h"

namespace sim {

template <class T> static T combine(int op, T a, T b) {
  switch (op) {
    case MSL_SUM: return a + b;
    case MSL_PROD: return a * b;
    case MSL_MIN: return b < a ? b : a;
    case MSL_MAX: return a < b ? b : a;
  }
  if constexpr (!__is_same(T, float)) {
    if (op == MSL_AND) return a & b;
    if (op == MSL_OR) return a | b;
    return a ^ b;
  }
  return a;
}

// Ascending butterfly (xor 1, 2, 4, ...) over the active lanes, as Apple's GPUs order it.
template <class T> static void reduce_lanes(SimdGroup* g, int parity, int op, int width, bool is_half) {
  unsigned mask = g->mask[parity];
  T value[32];
  bool is_active[32];
  for (int i = 0; i < 32; i++) {
    is_active[i] = mask >> i & 1;
    value[i] = T(0);
    if (is_active[i]) memcpy(&value[i], g->slot[parity][i], 4);
  }
  for (int step = 1; step < width; step *= 2) {
    T next[32];
    bool is_next_active[32];
    for (int i = 0; i < 32; i++) {
      int j = i ^ step;
      is_next_active[i] = is_active[i] || is_active[j];
      next[i] = !is_active[i] ? value[j] : !is_active[j] ? value[i] : combine<T>(op, value[i], value[j]);
      if (is_half) next[i] = (T)(_Float16)next[i];
    }
    memcpy(value, next, sizeof value);
    memcpy(is_active, is_next_active, sizeof is_active);
  }
  memcpy(g->result[parity], value, sizeof value);
}

template <class T> static void scan_lanes(void* value, SimdGroup* g, int parity, int op, unsigned end) {
  T total = op == MSL_PROD ? T(1) : T(0);
  for (unsigned i = 0; i < end; i++) {
    if (!(g->mask[parity] >> i & 1)) continue;
    T x;
    memcpy(&x, g->slot[parity][i], 4);
    total = combine<T>(op, total, x);
  }
  memcpy(value, &total, 4);
}

// Element held by a lane: two adjacent columns of one row, as MLX's kernels assume.
static void matrix_position(int lane, int& row, int& column) {
  int quad = lane / 4;
  row = (quad & 4) + (lane / 2) % 4;
  column = (quad & 2) * 2 + (lane % 2) * 2;
}

static void multiply_matrices(SimdGroup* g, int parity) {
  float A[8][8], B[8][8], C[8][8];
  for (int lane = 0; lane < 32; lane++) {
    int r, c;
    matrix_position(lane, r, c);
    float in[6];
    memcpy(in, g->slot[parity][lane], sizeof in);
    for (int k = 0; k < 2; k++) {
      A[r][c + k] = in[k];
      B[r][c + k] = in[2 + k];
      C[r][c + k] = in[4 + k];
    }
  }
  for (int r = 0; r < 8; r++)
    for (int k = 0; k < 8; k++)
      for (int c = 0; c < 8; c++) C[r][c] = __builtin_fmaf(A[r][k], B[k][c], C[r][c]);
  memcpy(g->result[parity], C, sizeof C);
}

}  // namespace sim

using namespace sim;
extern "C" {
void msl_reduce(void* value, int type, int op, int width, const char* file, unsigned line) {
  Fiber* me = state.current;
  int parity = simd_op(kReduce, value, 4, 0, {file, line});
  SimdGroup* g = me->group;
  if (!g->has_result[parity]) {
    g->has_result[parity] = true;
    if (type == MSL_T_F32 || type == MSL_T_F16) reduce_lanes<float>(g, parity, op, width, type == MSL_T_F16);
    else if (type == MSL_T_I32) reduce_lanes<int>(g, parity, op, width, false);
    else reduce_lanes<unsigned>(g, parity, op, width, false);
  }
  memcpy(value, &g->result[parity][me->lane], 4);
}

void msl_scan(void* value, int type, int op, int kind, const char* file, unsigned line) {
  Fiber* me = state.current;
  int parity = simd_op(kScan, value, 4, 0, {file, line});
  unsigned end = me->lane + (kind == MSL_SCAN_INC);
  if (type == MSL_T_F32 || type == MSL_T_F16) scan_lanes<float>(value, me->group, parity, op, end);
  else if (type == MSL_T_I32) scan_lanes<int>(value, me->group, parity, op, end);
  else scan_lanes<unsigned>(value, me->group, parity, op, end);
}

// A source outside of the group or not active is undefined in Metal: the result is poisoned.
void msl_shuffle(void* value, unsigned size, int mode, int argument, const void* fill, int modulo, int width,
                 const char* file, unsigned line) {
  Fiber* me = state.current;
  int parity = simd_op(kShuffle, value, size, 0, {file, line});
  SimdGroup* g = me->group;
  int segment = fill ? modulo : width;
  int base = (int)me->lane / segment * segment, at = (int)me->lane - base, from = 0;
  bool is_inside = true;
  switch (mode) {
    case MSL_SHUF_IDX: from = argument; is_inside = argument < width; break;
    case MSL_SHUF_XOR: from = at ^ argument; is_inside = from < width; break;
    case MSL_SHUF_UP: from = at - argument; is_inside = from >= 0; break;
    case MSL_SHUF_DOWN: from = at + argument; is_inside = from < segment; break;
    case MSL_ROT_UP: from = (at - argument) & (width - 1); break;
    default: from = (at + argument) & (width - 1);
  }
  if (!is_inside && fill) memcpy(value, fill, size);
  else if (is_inside && (g->mask[parity] >> (base + from) & 1)) memcpy(value, g->slot[parity][base + from], size);
  else memset(value, 0xff, size);
}

msl_u32 msl_ballot(bool value, const char* file, unsigned line) {
  int deposit = value;
  Fiber* me = state.current;
  int parity = simd_op(kBallot, &deposit, 4, 0, {file, line});
  msl_u32 votes = 0;
  for (unsigned rest = me->group->mask[parity]; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest), vote;
    memcpy(&vote, me->group->slot[parity][lane], 4);
    if (vote) votes |= 1u << lane;
  }
  return votes;
}

void msl_mma(float* d2, const float* a2, const float* b2, const float* c2, const char* file, unsigned line) {
  float deposit[6] = {a2[0], a2[1], b2[0], b2[1], c2[0], c2[1]};
  Fiber* me = state.current;
  int parity = simd_op(kMatrix, deposit, sizeof deposit, 0, {file, line});
  SimdGroup* g = me->group;
  if (!g->has_result[parity]) {
    g->has_result[parity] = true;
    if (g->mask[parity] != ~0u) {
      char message[500];
      snprintf(message, sizeof message, "simdgroup matrix multiply with inactive lanes: %s", describe(*me).text);
      report("divergence", message, 0, {file, line});
    }
    multiply_matrices(g, parity);
  }
  int r, c;
  matrix_position((int)me->lane, r, c);
  d2[0] = g->result[parity][r * 8 + c];
  d2[1] = g->result[parity][r * 8 + c + 1];
}
}
