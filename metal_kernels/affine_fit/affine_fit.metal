// Affine quantization: for each group of weights the scale s and bias b with the least squared error that a search finds.
//
//   X = (w - c) 2^k in integers;  q = clip(round((X - b) / s), 0, 2^BITS - 1);  E = sum (X - s q - b)^2
//   (s, b) is first what mx.quantize takes, then STARTS ranges whose ends are drawn in by so many tenths of a step, then ROUNDS
//   times the best so far; after each, argmin E for the same q. The least E is kept, s and b rounded to T before it is counted.
//
// Layout        w [N, K] of type W; starts [STARTS, 2] int32, low and high end; weight [N, K BITS / 32] uint32, scales and biases [N, K / GROUP] of T
// Grid          x: one thread a group, which keeps it in registers.
// Requires      K a multiple of GROUP, GROUP of 32.
// Computes      the same bits as naive.py: sums are of integers, and a float product that is added to anything is exact or
//               rounded before, so that it makes no difference whether a compiler fuses the two.

constant constexpr int MOST = 32767, FRACTION = 512, MOST_SHIFT = 100;
constant constexpr float FARTHEST = 131072.0f, LEAST_SCALE = 0x1p-12f, LEAST_STEP = 1e-7f;

// Units of X: (up, down) = (2^k, 2^-k), and the weight c that is 0 in them.
struct Units {
  float up, down, zero;
};

template <typename T>
METAL_FUNC float stored_scale(float s, Units units) { return float(T(s * units.down)) * units.up; }

template <typename T>
METAL_FUNC float stored_bias(float b, Units units) {
  return (float(T(b * units.down + units.zero)) - units.zero) * units.up;
}

template <int TOP>
METAL_FUNC bool fits(float s, float b) { return metal::abs(s) * float(TOP) <= FARTHEST && metal::abs(b) <= FARTHEST; }

// How codes are computed from (s, b): q = int((X - start) inverse), cut off; all 0 where these cannot be used.
struct Line {
  float start, inverse;
};

template <int TOP>
METAL_FUNC Line line_of(float s, float b) {
  const bool is_used = fits<TOP>(s, b) && metal::abs(s) >= LEAST_SCALE;
  return {is_used ? b - s * 0.5f : 0.0f, is_used ? 1.0f / s : 0.0f};
}

template <int TOP>
METAL_FUNC int code(short X, Line line) {
  return metal::clamp(int((float(X) - line.start) * line.inverse), 0, TOP);
}

// E without sum X^2, in units of 2^-18, of codes with these sums.
template <int N>
METAL_FUNC long error(float s, float b, int sum, int q, int qq, int qx) {
  const long S = long(metal::rint(s * float(FRACTION))), B = long(metal::rint(b * float(FRACTION)));
  return S * (S * qq + 2 * (B * q - long(FRACTION) * qx)) + B * (N * B - 2 * FRACTION * long(sum));
}

// ---- kernel ----
constexpr int TOP = (1 << BITS) - 1, WHOLE = 10 * TOP;
const uint group = thread_position_in_grid.x;
const device W* from = w + ulong(group) * GROUP;

float least_w = INFINITY, most_w = -INFINITY;
#pragma unroll
for (int i = 0; i < GROUP; i++) {
  least_w = metal::min(least_w, float(from[i]));
  most_w = metal::max(most_w, float(from[i]));
}
const float zero = metal::min(metal::max(least_w, 0.0f), most_w);
const float largest = metal::max(most_w - zero, zero - least_w);
const int shift = metal::min(15 - (int(as_type<uint>(largest) >> 23) - 126), MOST_SHIFT);
const Units units = {as_type<float>(uint(127 + shift) << 23), as_type<float>(uint(127 - shift) << 23), zero};

short X[GROUP];
int low = MOST, high = -MOST, sum = 0;
#pragma unroll
for (int i = 0; i < GROUP; i++) {
  const int x = int(metal::clamp(metal::rint((float(from[i]) - zero) * units.up), -float(MOST), float(MOST)));
  X[i] = short(x);
  low = metal::min(low, x);
  high = metal::max(high, x);
  sum += x;
}

// What mx.quantize takes.
const float first = float(T(least_w)), last = float(T(most_w));
const bool is_low = metal::abs(first) > metal::abs(last);
const float edge = is_low ? first : last, size = metal::max((last - first) / float(TOP), LEAST_STEP);
const float step = is_low ? size : -size, steps = metal::rint(edge / step);
float best_s = float(T(steps == 0.0f ? step : edge / steps)) * units.up;
float best_b = ((steps == 0.0f ? 0.0f : edge) - zero) * units.up;
long least = 0x7fffffffffffffffL;

const int across = metal::max(high - low, 1);
for (int n = 0; n <= STARTS + ROUNDS; n++) {
  float s = best_s, b = best_b;
  if (n >= 1 && n <= STARTS) {
    const int below = starts[2 * n - 2], above = starts[2 * n - 1];
    s = float(across * (WHOLE - below - above)) / float(WHOLE * TOP);
    b = float(low) + float(across * below) / float(WHOLE);
  }
  const Line line = line_of<TOP>(s, b);
  int q_sum = 0, qq = 0, qx = 0;
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    const int q = code<TOP>(X[i], line);
    q_sum += q;
    qq += q * q;
    qx += q * int(X[i]);
  }
  if (n == 0 && fits<TOP>(s, b)) least = error<GROUP>(s, b, sum, q_sum, qq, qx);
  const int variance = GROUP * qq - q_sum * q_sum;
  const long covariance = GROUP * long(qx) - long(sum) * q_sum;
  const bool is_found = variance > 0 && covariance != 0;
  const float next_s = stored_scale<T>(is_found ? float(covariance) / float(variance) : s, units);
  const float next_b = stored_bias<T>((float(sum) - metal::rint(next_s * float(q_sum))) / float(GROUP), units);
  if (fits<TOP>(next_s, next_b)) {
    const long e = error<GROUP>(next_s, next_b, sum, q_sum, qq, qx);
    if (e < least) {
      least = e;
      best_s = next_s;
      best_b = next_b;
    }
  }
}

const Line line = line_of<TOP>(best_s, best_b);
device uint* to = weight + ulong(group) * (GROUP / 32 * BITS);
#pragma unroll
for (int block = 0; block < GROUP / 32; block++) {
  uint words[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) words[i] = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const uint q = code<TOP>(X[32 * block + i], line);
    const int word = i * BITS / 32, at = i * BITS % 32;
    words[word] |= q << at;
    if (at + BITS > 32) words[word + 1] |= q >> (32 - at);
  }
#pragma unroll
  for (int i = 0; i < BITS; i++) to[block * BITS + i] = words[i];
}
scales[group] = T(best_s * units.down);
biases[group] = T(best_b * units.down + zero);
