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
// ---- kernel ----
const ulong token = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
threadgroup float biased[E];
threadgroup float best[GROUPS];
uint expert = 0;
float weight = 0;
choose<E, TOP_K, GROUPS, TOPK_GROUP, SIMDGROUPS, HAS_BIAS, NORMALIZE>(
    logits + token * E, bias, as_type<float>(SCALING), thread_index_in_threadgroup, simdgroup_index_in_threadgroup, lane,
    biased, best, expert, weight);
if (simdgroup_index_in_threadgroup == 0 && int(lane) < TOP_K) {
  chosen[token * TOP_K + lane] = int(expert);
  weights[token * TOP_K + lane] = weight;
}
