// One tile of a product with packed weights: the sums over K of BM gathered rows of x times BN rows of weights, on
// simdgroup matrices with float sums. Needs codes.metal and tall.metal.
//
// A threadgroup of WM x WN simdgroups keeps a slice of both operands, BK values deep, in threadgroup memory as T (float,
// half or bfloat), rows padded by 16 bytes against bank conflicts. The next slice travels from device memory to registers
// while the present one is multiplied: one buffer, two barriers a slice. Each simdgroup has BM / WM x BN / WN sums.
// All tiles start at even elements of rows of even length: MSL_EVEN_PAIRS.

// 16 bytes of values: what threadgroup memory is written with.
template <typename T>
METAL_FUNC uint4 pack_chunk(thread const float* v) {
  if constexpr (sizeof(T) == 4) {
    return uint4(as_type<uint>(v[0]), as_type<uint>(v[1]), as_type<uint>(v[2]), as_type<uint>(v[3]));
  } else {
    return uint4(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]), pack_pair<T>(v[6], v[7]));
  }
}

// 16 bytes of T from as many values of type X.
template <typename T, typename X>
METAL_FUNC uint4 load_chunk(const device X* from) {
  constexpr int CHUNK = 16 / sizeof(T), WORDS = CHUNK * sizeof(X) / 4;
  uint words[WORDS];
  load_words<WORDS>((const device uint*)from, words);
  if constexpr (is_same_v<T, X>) {
    return uint4(words[0], words[1], words[2], words[3]);
  } else {
    float v[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = code<0, sizeof(X) * 8, X>(words, i);
    return pack_chunk<T>(v);
  }
}

// rows: for each of the thread's 16-byte chunks of the x slice (chunk c of a slice is row c / (BK / CHUNK)), its row of x.
// Weight row i of the tile is row `column` + i of w_a for i < HALF, and row `column` + i - HALF of w_b from there on;
// rows past N repeat the last. tile: (BM + BN) (BK + 16 / sizeof(T)) values. acc: the simdgroup's sums, row by row.
template <int MODE, int BITS, int GROUP, int N, int K, int BM, int BN, int BK, int WM, int WN, int HALF, typename X,
          typename P, typename S, typename T>
METAL_FUNC void grouped_product(const device X* x, thread const uint* rows, const device P* w_a, const device S* s_a,
                                const device S* b_a, const device P* w_b, const device S* s_b, const device S* b_b,
                                uint column, uint thread_index, uint simdgroup, threadgroup T* tile,
                                thread simdgroup_matrix<float, 8, 8>* acc) {
  constexpr int THREADS = 32 * WM * WN, CHUNK = 16 / sizeof(T), LD = BK + CHUNK;
  constexpr int XCHUNKS = BM * (BK / CHUNK) / THREADS;
  constexpr int BLOCKS = BN * (BK / 32), WBLOCKS = (BLOCKS + THREADS - 1) / THREADS, WORDS = BITS;
  constexpr int TM = BM / WM / 8, TN = BN / WN / 8;
  static_assert(BM * (BK / CHUNK) % THREADS == 0, "chunks of x do not share out");
  threadgroup T* xs = tile;
  threadgroup T* ws = tile + BM * LD;
  threadgroup const T* own_xs = xs + simdgroup / WN * (TM * 8 * LD);
  threadgroup const T* own_ws = ws + simdgroup % WN * (TN * 8 * LD);
#pragma unroll
  for (int i = 0; i < TM * TN; i++) acc[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

  uint4 chunks[XCHUNKS];
  uint words[WBLOCKS * WORDS];
  float scales[WBLOCKS], biases[WBLOCKS];
  for (int k = 0; k < K + BK; k += BK) {
    // What was fetched a round ago becomes the present slice.
    if (k > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
      for (int i = 0; i < XCHUNKS; i++) {
        const int c = thread_index + i * THREADS;
        *(threadgroup uint4*)(xs + c / (BK / CHUNK) * LD + c % (BK / CHUNK) * CHUNK) = chunks[i];
      }
#pragma unroll
      for (int i = 0; i < WBLOCKS; i++) {
        const int b = thread_index + i * THREADS;
        if (BLOCKS % THREADS != 0 && b >= BLOCKS) break;
        threadgroup T* to = ws + b / (BK / 32) * LD + b % (BK / 32) * 32;
#pragma unroll
        for (int j = 0; j < 32; j += CHUNK) {
          float v[CHUNK];
#pragma unroll
          for (int l = 0; l < CHUNK; l++) {
            v[l] = code<MODE, BITS, P>(words + i * WORDS, j + l);
            if (MODE != 0) v[l] = v[l] * scales[i] + biases[i];
          }
          *(threadgroup uint4*)(to + j) = pack_chunk<T>(v);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (k < K) {
#pragma unroll
      for (int i = 0; i < XCHUNKS; i++) {
        const int c = thread_index + i * THREADS, at = k + c % (BK / CHUNK) * CHUNK;
        chunks[i] = at < K ? load_chunk<T>(x + rows[i] * K + at) : uint4(0u);
      }
#pragma unroll
      for (int i = 0; i < WBLOCKS; i++) {
        const int b = thread_index + i * THREADS, at = k + b % (BK / 32) * 32;
        if (BLOCKS % THREADS != 0 && b >= BLOCKS) break;
        const uint r = b / (BK / 32);
        const bool is_b = HALF < BN && r >= HALF;
        const uint n = min(column + (is_b ? r - HALF : r), uint(N - 1));
        if (at < K) {
          load_words<WORDS>((const device uint*)(is_b ? w_b : w_a) + n * (K / 32 * BITS) + at / 32 * BITS,
                            words + i * WORDS);
          if constexpr (MODE != 0) {
            const uint group = n * (K / GROUP) + at / GROUP;
            scales[i] = load_scale<MODE, BITS>(is_b ? s_b : s_a, group);
            biases[i] = MODE == 1 ? float((is_b ? b_b : b_a)[group]) : 0.0f;
          }
        } else {
          scales[i] = biases[i] = 0.0f;
#pragma unroll
          for (int j = 0; j < WORDS; j++) words[i * WORDS + j] = 0u;
        }
      }
    }
    if (k > 0) {
#pragma unroll
      for (int kk = 0; kk < BK; kk += 16) {
        simdgroup_matrix<T, 8, 8> a[2 * TM], b0, b1;
#pragma unroll
        for (int i = 0; i < 2 * TM; i++) simdgroup_load(a[i], own_xs + (i / 2 * 8 * LD + kk + i % 2 * 8), LD);
#pragma unroll
        for (int j = 0; j < TN; j++) {
          simdgroup_load(b0, own_ws + (j * 8 * LD + kk), LD, ulong2(0, 0), true);
          simdgroup_load(b1, own_ws + (j * 8 * LD + kk + 8), LD, ulong2(0, 0), true);
#pragma unroll
          for (int i = 0; i < TM; i += 2) multiply_tall(acc + i * TN + j, acc + (i + 1) * TN + j, a + 2 * i, b0, b1);
        }
      }
    }
  }
}

// Writes the sums as BM rows of BN + 4 floats over the tile, for all threads to read: the last use of the tile as T.
template <int BM, int BN, int WM, int WN>
METAL_FUNC void share_sums(thread simdgroup_matrix<float, 8, 8>* acc, uint simdgroup, threadgroup float* sums) {
  constexpr int TM = BM / WM / 8, TN = BN / WN / 8;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int m = simdgroup / WN * TM * 8, n = simdgroup % WN * TN * 8;
#pragma unroll
  for (int i = 0; i < TM; i++) {
#pragma unroll
    for (int j = 0; j < TN; j++) simdgroup_store(acc[i * TN + j], sums + (m + i * 8) * (BN + 4) + n + j * 8, BN + 4);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
