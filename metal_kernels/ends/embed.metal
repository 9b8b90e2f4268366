// Rows of a packed matrix as floats: the embedding of a few tokens.
//
// Layout        tokens [TOKENS] of any integer; w [N, K] packed; y [TOKENS, K] of O
// Grid          x: a threadgroup a token. A thread unpacks every THREADS-th block of 32 values.
// Requires      K a multiple of 32. A token that is no row is the last row.
// ---- kernel ----
const ulong token = threadgroup_position_in_grid.x;
const uint row = metal::min(uint(tokens[token]), uint(N - 1));
for (int block = thread_index_in_threadgroup; block < K / 32; block += THREADS) {
  uint words[BITS];
  load_words<BITS>((const device uint*)w_w + (row * (K / 32) + block) * BITS, words);
  const uint group = row * (K / GROUP) + block * 32 / GROUP;
  const float scale = load_scale<MODE, BITS>(w_s, group), bias = MODE == 1 ? float(w_b[group]) : 0.0f;
  float values[32];
#pragma unroll
  for (int i = 0; i < 32; i++) values[i] = scale * code<MODE, BITS, W>(words, i) + bias;
#pragma unroll
  for (int i = 0; i < 32; i += 8) store_pack<8>(y + token * K + block * 32 + i, values + i);
}
