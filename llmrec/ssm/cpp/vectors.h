// Sixteen float32 at a time, in the compiler's own vector type: AVX-512 as it is, two or four registers elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void add(float* p, Vec v) { store(p, load(p) + v); }

inline float sum(Vec v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Sums of P vectors; four at a time share their shuffles.
template <int P> inline void sums(const Vec* v, float* out) {
  if constexpr (P % 4 == 0) {
    for (int p = 0; p < P; p += 4) {
      Vec ab = __builtin_shufflevector(v[p], v[p + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[p], v[p + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
      Vec cd = __builtin_shufflevector(v[p + 2], v[p + 3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[p + 2], v[p + 3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
      Vec all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      all += __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
      all += __builtin_shufflevector(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
      for (int i = 0; i < 4; ++i) out[p + i] = all[i];
    }
  } else {
    for (int p = 0; p < P; ++p) out[p] = sum(v[p]);
  }
}

// exp, to 2 units in the last place; below -87 a number that is zero to every use.
inline Vec exp(Vec x) {
  x = x < -87.f ? x * 0 - 87.f : x;
  x = x > 88.f ? x * 0 + 88.f : x;
  Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // nearest integer
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.f;
  return e * (Vec)((__builtin_convertvector(n, IVec) + 127) << 23);
}

// Channels whose number is no multiple of 16: the last `count` of them.
inline Vec load_part(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store_part(float* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}

}  // namespace
