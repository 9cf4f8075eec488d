// Vectors of floats in the compiler's own notation, so that one source serves AVX-512, AVX2, NEON and the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace alignment {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRowsPerTile = 12;  // 12 x 2 accumulators, 2 vectors of B and a broadcast fill 32 registers
#elif defined(__AVX2__) || defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRowsPerTile = 6;  // 16 registers
#else
constexpr int kLanes = 4;
constexpr int kRowsPerTile = 8;
#endif
constexpr int kVectors = 2;                  // vectors side by side in a tile
constexpr int kPanel = kVectors * kLanes;    // columns of a tile

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load_some(const float* p, int64_t n) {  // n < kLanes; zeros behind
  Vec v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store_some(float* p, Vec v, int64_t n) { std::memcpy(p, &v, n * sizeof(float)); }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline float largest(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// The lanes of a and b in turn: of their first halves, and of their second halves. The masks are constants, which the
// compilers want in forms of their own.
#ifdef __clang__
template <int64_t... kLane>
inline Vec first_halves(Vec a, Vec b, std::integer_sequence<int64_t, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
}
template <int64_t... kLane>
inline Vec second_halves(Vec a, Vec b, std::integer_sequence<int64_t, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...);
}
using Lanes = std::make_integer_sequence<int64_t, kLanes>;
inline Vec first_halves(Vec a, Vec b) { return first_halves(a, b, Lanes{}); }
inline Vec second_halves(Vec a, Vec b) { return second_halves(a, b, Lanes{}); }
#else
inline IntVec in_turn(int from) {
  IntVec mask;
  for (int i = 0; i < kLanes; i++) mask[i] = i / 2 + (i % 2) * kLanes + from;
  return mask;
}
inline Vec first_halves(Vec a, Vec b) { return __builtin_shuffle(a, b, in_turn(0)); }
inline Vec second_halves(Vec a, Vec b) { return __builtin_shuffle(a, b, in_turn(kLanes / 2)); }
#endif

// The nearest bfloat16 number, halves to even; a NaN stays one. A bfloat16 is the upper half of a float32.
inline Vec nearest_bfloat16(Vec x) {
  typedef uint32_t BitsVec __attribute__((vector_size(kLanes * 4)));
  BitsVec bits, kept;
  std::memcpy(&bits, &x, sizeof(bits));
  kept = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  Vec result;
  std::memcpy(&result, &kept, sizeof(result));
  return x == x ? result : x;
}

// exp(x) to about 1 unit in the last place; below -87.3 it is 0, above 88.3 it stays finite.
// Range reduction by ln 2 in two parts, then a polynomial of degree 6 (Cephes, expf).
inline Vec exp(Vec x) {
  const Vec top = splat(88.3f), bottom = splat(-87.3f);
  Vec clipped = x > top ? top : x;
  clipped = clipped < bottom ? bottom : clipped;
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = clipped * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = clipped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec scale = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &scale, sizeof(power));
  Vec result = p * power;
  return x < bottom ? Vec{} : result;
}

}  // namespace alignment
