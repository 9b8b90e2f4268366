// Adjacent elements of a type, moved at once, so that neighbouring lanes use whole lines; needs codes.metal before it.

// N adjacent elements in threadgroup memory that one store moves.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T e[N];
};

template <int P, typename T>
METAL_FUNC void load_pack(const device T* from, thread float* to) {
  if constexpr (sizeof(T) * P % 4 == 0) {
    uint words[sizeof(T) * P / 4];
    load_words<sizeof(T) * P / 4>((const device uint*)from, words);
#pragma unroll
    for (int i = 0; i < P; i++) to[i] = code<0, sizeof(T) * 8, T>(words, i);
  } else {
#pragma unroll
    for (int i = 0; i < P; i++) to[i] = float(from[i]);
  }
}

template <int P, typename T>
METAL_FUNC void store_pack(device T* to, thread const float* from) {
  if constexpr (sizeof(T) * P % 4 == 0) {
    constexpr int NW = sizeof(T) * P / 4;
    uint words[NW];
#pragma unroll
    for (int i = 0; i < NW; i++) {
      if constexpr (sizeof(T) == 4) {
        words[i] = as_type<uint>(T(from[i]));
      } else {
        words[i] = pack_pair<T>(from[2 * i], from[2 * i + 1]);
      }
    }
    if constexpr (NW % 4 == 0) {
#pragma unroll
      for (int i = 0; i < NW; i += 4) {
        ((device uint4*)to)[i / 4] = uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    } else if constexpr (NW % 2 == 0) {
#pragma unroll
      for (int i = 0; i < NW; i += 2) ((device uint2*)to)[i / 2] = uint2(words[i], words[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < NW; i++) ((device uint*)to)[i] = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < P; i++) to[i] = T(from[i]);
  }
}

// How many adjacent elements of a head of D a lane may hold so that partners R / 2 apart are also adjacent.
constexpr int pack_size(int D, int R) {
  return D % 128 == 0 && R % 8 == 0 ? 4 : D % 64 == 0 && R % 4 == 0 ? 2 : 1;
}
