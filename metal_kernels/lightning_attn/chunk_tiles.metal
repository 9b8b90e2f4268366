// What the two passes of the chunked kernel share: 8 x 8 tiles of simdgroup_matrix, the state in registers, the loads.
//
// A lane holds two adjacent columns of one row of a tile. Which ones Metal does not say, so each lane reads its place
// off a loaded matrix whose elements are their own indices. That also serves MSL_TENSOR_CORE_LAYOUT, the order of lanes
// that costs the CUDA twin nothing.

typedef simdgroup_matrix<float, 8, 8> Accumulator;

struct Place {
  int row;
  int column;
};

// Requires that index[i] = i for i < 64, in memory that the simdgroup may read.
METAL_FUNC Place place_in_tile(const threadgroup float* index) {
  Accumulator m;
  simdgroup_load(m, index, 8);
  const int first = int(m.thread_elements()[0]);
  Place place;
  place.row = first / 8;
  place.column = first % 8;
  return place;
}

// Tiles of M out of shared memory of T, which starts at `x` and has rows of `pitch`; transposed, if so asked.
template <typename M, typename T>
struct Tile {
  static METAL_FUNC simdgroup_matrix<M, 8, 8> load(const threadgroup T* x, int pitch, Place place) {
    const vec<T, 2> e = *(const threadgroup vec<T, 2>*)(x + place.row * pitch + place.column);
    simdgroup_matrix<M, 8, 8> m;
    m.thread_elements()[0] = M(float(e.x));
    m.thread_elements()[1] = M(float(e.y));
    return m;
  }
  static METAL_FUNC simdgroup_matrix<M, 8, 8> load_transposed(const threadgroup T* x, int pitch, Place place) {
    simdgroup_matrix<M, 8, 8> m;
    m.thread_elements()[0] = M(float(x[place.column * pitch + place.row]));
    m.thread_elements()[1] = M(float(x[(place.column + 1) * pitch + place.row]));
    return m;
  }
};
template <typename T>
struct Tile<T, T> {
  static METAL_FUNC simdgroup_matrix<T, 8, 8> load(const threadgroup T* x, int pitch, Place) {
    simdgroup_matrix<T, 8, 8> m;
    simdgroup_load(m, x, pitch);
    return m;
  }
  static METAL_FUNC simdgroup_matrix<T, 8, 8> load_transposed(const threadgroup T* x, int pitch, Place) {
    simdgroup_matrix<T, 8, 8> m;
    simdgroup_load(m, x, pitch, ulong2(0, 0), true);
    return m;
  }
};

// A float tile as the sum of PARTS tiles of M, each what rounding left of the ones before: one part of float is the
// tile itself, three of bfloat carry all 24 bits. part[p][n] is part p of the n-th of N tiles.
template <typename M, int PARTS, int N>
struct Split {
  simdgroup_matrix<M, 8, 8> part[PARTS][N];

  // The n-th tile, from this lane's two elements.
  METAL_FUNC void set(int n, float x, float y) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      const M high_x = M(x), high_y = M(y);
      part[p][n].thread_elements()[0] = high_x;
      part[p][n].thread_elements()[1] = high_y;
      x -= float(high_x);
      y -= float(high_y);
    }
  }
};

// Products of BLOCK x BLOCK tiles a, row by row, and BLOCK tiles b one below the other: d0 is the upper sum, d1 the
// lower. With BLOCK 1 there is d0 only.
template <int BLOCK>
struct Product;
template <>
struct Product<1> {
  template <typename M>
  static METAL_FUNC void add(thread Accumulator& d0, thread Accumulator&, const thread simdgroup_matrix<M, 8, 8>* a,
                             const thread simdgroup_matrix<M, 8, 8>* b) {
    simdgroup_multiply_accumulate(d0, a[0], b[0], d0);
  }
};
template <>
struct Product<2> {
  template <typename M>
  static METAL_FUNC void add(thread Accumulator& d0, thread Accumulator& d1, const thread simdgroup_matrix<M, 8, 8>* a,
                             const thread simdgroup_matrix<M, 8, 8>* b) {
#ifdef MSL_MULTIPLY_16X8X16
    MSL_MULTIPLY_16X8X16(d0, d1, a[0], a[1], a[2], a[3], b[0], b[1]);
#else
    simdgroup_multiply_accumulate(d0, a[0], b[0], d0);
    simdgroup_multiply_accumulate(d1, a[2], b[0], d1);
    simdgroup_multiply_accumulate(d0, a[1], b[1], d0);
    simdgroup_multiply_accumulate(d1, a[3], b[1], d1);
#endif
  }
};

// C rows of WIDTH elements, `stride` apart, into shared memory at `pitch`; zeros for rows from `left` on and, with
// HAS_MASK, for masked ones, so that nothing of them, not even a NaN, reaches a product.
template <typename T, int C, int WIDTH, int THREADS, bool HAS_MASK, typename Mask>
METAL_FUNC void load_rows(const device T* x, int stride, Mask mask, int left, threadgroup T* out, int pitch,
                          int thread_index) {
  for (int i = thread_index; i < C * WIDTH / 4; i += THREADS) {
    const int row = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4;
    vec<T, 4> e = vec<T, 4>(T(0.0f));
    if (row < left && (!HAS_MASK || mask[row])) e = *(const device vec<T, 4>*)(x + row * stride + column);
    *(threadgroup vec<T, 4>*)(out + row * pitch + column) = e;
  }
}

// For each of a chunk's C <= 32 tokens i, with c_i the number of counted tokens up to and with i: c_i, what the state
// before the chunk has decayed to (exp(-s c_i)), and what token i's own part has at the end (exp(-s (c_last - c_i))).
// One simdgroup calls this; no exponent is positive.
METAL_FUNC void count_tokens(bool is_counted, float rate, int C, int lane, threadgroup int* counts,
                             threadgroup float* carried, threadgroup float* kept) {
  const int count = simd_prefix_inclusive_sum(is_counted ? 1 : 0);
  const int all = simd_max(count);
  if (lane < C) {
    counts[lane] = count;
    carried[lane] = metal::precise::exp(-rate * count);
    kept[lane] = metal::precise::exp(-rate * (all - count));
  }
}

// The part of the state that a simdgroup owns: K rows of 8 TILES columns, in registers. Pointers into memory are to
// this lane's place in the first tile, with rows of `pitch` floats.
template <int K, int TILES>
struct State {
  Accumulator tiles[K / 8][TILES];

  METAL_FUNC void clear() {
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
#pragma unroll
      for (int c = 0; c < TILES; c++) tiles[i][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }

  METAL_FUNC void scale(float factor) {
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        tiles[i][c].thread_elements()[0] *= factor;
        tiles[i][c].thread_elements()[1] *= factor;
      }
    }
  }

  METAL_FUNC void add(const device float* x, int pitch) {
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        const float2 e = *(const device float2*)(x + i * 8 * pitch + c * 8);
        tiles[i][c].thread_elements()[0] += e.x;
        tiles[i][c].thread_elements()[1] += e.y;
      }
    }
  }

  METAL_FUNC void store(device float* x, int pitch) {
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        *(device float2*)(x + i * 8 * pitch + c * 8) =
            float2(tiles[i][c].thread_elements()[0], tiles[i][c].thread_elements()[1]);
      }
    }
  }

  // S = exp(-s c_last) S + sum_j exp(-s (c_last - c_j)) k_j v_j^T over a chunk of C tokens. The factors go onto v, of
  // which there are few tiles, and v is split, so that k stays exact. `keys` and `values` are the chunk's rows in
  // shared memory, values from this simdgroup's first column on.
  template <typename M, int PARTS, int BLOCK, int C, typename T>
  METAL_FUNC void update(const threadgroup T* keys, int key_pitch, const threadgroup T* values, int value_pitch,
                         const threadgroup float* carried, const threadgroup float* kept, Place place) {
    scale(carried[C - 1]);
#pragma unroll
    for (int j = 0; j < C / 8; j += BLOCK) {
      Split<M, PARTS, BLOCK> v[TILES];
#pragma unroll
      for (int n = 0; n < BLOCK; n++) {
        const int token = (j + n) * 8 + place.row;
#pragma unroll
        for (int c = 0; c < TILES; c++) {
          const vec<T, 2> e = *(const threadgroup vec<T, 2>*)(values + token * value_pitch + c * 8 + place.column);
          v[c].set(n, float(e.x) * kept[token], float(e.y) * kept[token]);
        }
      }
#pragma unroll
      for (int i = 0; i < K / 8; i += BLOCK) {
        simdgroup_matrix<M, 8, 8> k[BLOCK * BLOCK];
#pragma unroll
        for (int n = 0; n < BLOCK * BLOCK; n++) {
          const threadgroup T* first = keys + (j + n % BLOCK) * 8 * key_pitch + (i + n / BLOCK) * 8;
          k[n] = Tile<M, T>::load_transposed(first, key_pitch, place);
        }
#pragma unroll
        for (int c = 0; c < TILES; c++) {
#pragma unroll
          for (int p = 0; p < PARTS; p++) {
            Product<BLOCK>::template add<M>(tiles[i][c], tiles[i + BLOCK - 1][c], k, v[c].part[p]);
          }
        }
      }
    }
  }
};
