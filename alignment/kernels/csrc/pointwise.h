// Norms, rotary positions and gated activations, forward and backward, on rows of floats.
#pragma once

#include "simd.h"
#include "threads.h"

namespace alignment {

// f(i, n): the columns from i on, n of them (kLanes but for the last).
template <class F>
inline void over_columns(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
  if (i < width) f(i, width - i);
}
inline Vec get(const float* p, int64_t n) { return n == kLanes ? load(p) : load_some(p, n); }
inline void put(float* p, Vec v, int64_t n) { n == kLanes ? store(p, v) : store_some(p, v, n); }

// To bfloat16 numbers, in place.
inline void round_all(float* x, int64_t count) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < count ? begin + kChunk : count;
    over_columns(end - begin, [&](int64_t i, int64_t n) { put(x + begin + i, nearest_bfloat16(get(x + begin + i, n)), n); });
  });
}

// x += y, then rounded to bfloat16 numbers when `rounded`.
inline void add_all(float* x, const float* y, int64_t count, bool rounded) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < count ? begin + kChunk : count;
    over_columns(end - begin, [&](int64_t i, int64_t n) {
      const Vec total = get(x + begin + i, n) + get(y + begin + i, n);
      put(x + begin + i, rounded ? nearest_bfloat16(total) : total, n);
    });
  });
}

// 1 / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4).
inline float inverse_rms(const float* x, int64_t width, float epsilon) {
  Vec squares{};
  over_columns(width, [&](int64_t i, int64_t n) {
    const Vec v = get(x + i, n);
    squares += v * v;
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
}

// out = x * scale * (weight + offset); offset is 1 for Gemma, else 0.
inline void scale_row(const float* x, float scale, const float* weight, float offset, float* out, int64_t width) {
  over_columns(width, [&](int64_t i, int64_t n) { put(out + i, get(x + i, n) * scale * (get(weight + i, n) + offset), n); });
}

inline void rms_norm(const float* x, const float* weight, float offset, float epsilon, float* out, float* scales,
                     int64_t rows, int64_t width) {
  parallel_rows(rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float scale = inverse_rms(x + r * width, width, epsilon);
      if (scales) scales[r] = scale;
      scale_row(x + r * width, scale, weight, offset, out + r * width, width);
    }
  });
}

// dx (+)= of rms_norm, and the weight's gradient; summed over rows in the order of fixed blocks.
inline void rms_norm_backward(const float* x, const float* scales, const float* weight, float offset, const float* dout,
                              float* dx, float* dweight, int64_t rows, int64_t width, bool accumulate) {
  constexpr int64_t kBlock = 128;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  Buffer partial(blocks * width);
  parallel_for(blocks, [&](int64_t block) {
    float* mine = partial.data() + block * width;
    std::memset(mine, 0, width * sizeof(float));
    const int64_t end = (block + 1) * kBlock < rows ? (block + 1) * kBlock : rows;
    for (int64_t r = block * kBlock; r < end; r++) {
      const float *xr = x + r * width, *dr = dout + r * width;
      const float s = scales[r];
      Vec dots{};
      over_columns(width, [&](int64_t i, int64_t n) {
        const Vec dv = get(dr + i, n), xv = get(xr + i, n);
        dots += dv * (get(weight + i, n) + offset) * xv;
        put(mine + i, get(mine + i, n) + dv * xv * s, n);
      });
      const float mean = sum(dots) * s * s * s / static_cast<float>(width);
      over_columns(width, [&](int64_t i, int64_t n) {
        Vec g = get(dr + i, n) * (get(weight + i, n) + offset) * s - get(xr + i, n) * mean;
        if (accumulate) g += get(dx + r * width + i, n);
        put(dx + r * width + i, g, n);
      });
    }
  });
  std::memset(dweight, 0, width * sizeof(float));
  for (int64_t block = 0; block < blocks; block++)
    over_columns(width, [&](int64_t i, int64_t n) {
      put(dweight + i, get(dweight + i, n) + get(partial.data() + block * width + i, n), n);
    });
}

// Rotates pairs (x[i], x[i + half]) of each head by the position's angles (Su et al. 2021, RoFormer; the halves as in
// Llama's code). `turn` is 1, or -1 for the backward.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t heads, int64_t dim, float turn) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; h++) {
    float *a = x + h * dim, *b = a + half;
    over_columns(half, [&](int64_t i, int64_t n) {
      const Vec c = get(cosine + i, n), s = get(sine + i, n) * turn, u = get(a + i, n), v = get(b + i, n);
      put(a + i, u * c - v * s, n);
      put(b + i, v * c + u * s, n);
    });
  }
}

enum Activation { kSilu = 0, kGelu = 1 };

// act(gate) and its derivative.
inline void activate(Activation kind, Vec gate, Vec* value, Vec* slope) {
  if (kind == kSilu) {
    const Vec sigmoid = 1.0f / (1.0f + exp(-gate));
    *value = gate * sigmoid;
    if (slope) *slope = sigmoid * (1.0f + gate * (1.0f - sigmoid));
    return;
  }
  Vec normal{};  // gelu(x) = x Phi(x), exact (Hendrycks and Gimpel 2016)
  for (int i = 0; i < kLanes; i++) normal[i] = 0.5f * (1.0f + std::erf(gate[i] * 0.70710678118654752f));
  *value = gate * normal;
  if (slope) *slope = normal + gate * exp(-0.5f * gate * gate) * 0.39894228040143268f;
}

// out = act(gate) * up
inline void gate(Activation kind, const float* gates, const float* ups, float* out, int64_t count) {
  parallel_rows((count + 1023) / 1024, 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 1024, last = end * 1024 < count ? end * 1024 : count;
    over_columns(last - first, [&](int64_t i, int64_t n) {
      Vec value;
      activate(kind, get(gates + first + i, n), &value, nullptr);
      put(out + first + i, value * get(ups + first + i, n), n);
    });
  });
}

// From d out: d gate and d up in place of gate's and up's places `dgates`, `dups`, and out itself once more.
inline void gate_backward(Activation kind, const float* gates, const float* ups, const float* dout, float* dgates,
                          float* dups, float* out, int64_t count) {
  parallel_rows((count + 1023) / 1024, 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 1024, last = end * 1024 < count ? end * 1024 : count;
    over_columns(last - first, [&](int64_t j, int64_t n) {
      const int64_t i = first + j;
      Vec value, slope;
      activate(kind, get(gates + i, n), &value, &slope);
      const Vec up = get(ups + i, n), d = get(dout + i, n);
      put(out + i, value * up, n);
      put(dgates + i, d * up * slope, n);
      put(dups + i, d * value, n);
    });
  });
}

// sums[width] of rows, in the order of fixed blocks.
inline void column_sums(const float* x, int64_t rows, int64_t width, float* sums) {
  parallel_rows(width, 64, [&](int64_t begin, int64_t end) {
    std::memset(sums + begin, 0, (end - begin) * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
      over_columns(end - begin, [&](int64_t i, int64_t n) {
        put(sums + begin + i, get(sums + begin + i, n) + get(x + r * width + begin + i, n), n);
      });
  });
}

}  // namespace alignment
