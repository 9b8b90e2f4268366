// Adjacent elements of a type, moved at once; needs codes.metal before it.

// N adjacent elements that one store moves.
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
  device Pack<T, P>& out = *(device Pack<T, P>*)to;
#pragma unroll
  for (int i = 0; i < P; i++) out.e[i] = T(from[i]);
}

