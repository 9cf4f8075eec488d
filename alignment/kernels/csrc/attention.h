// Causal attention: over packed rows (prefill, scoring, training; forward and backward) and of one new token over a
// cache. Grouped-query heads share their keys (Ainslie et al. 2023); a window lets a token see itself and the
// window - 1 tokens before it (Mistral).
#pragma once

#include <initializer_list>

#include "gemm.h"
#include "pointwise.h"

namespace alignment {

struct Heads {
  int64_t query, key, dim;
  float scale;      // 1 / sqrt(dim)
  int64_t window;   // 0: all
  int64_t group() const { return query / key; }
};

constexpr int64_t kQueryBlock = 48;  // queries that share a pass over the keys
constexpr int64_t kCacheBlock = 16;  // tokens whose keys lie together in the cache, dimension by dimension

// B packed whole: [panel][depth][kPanel].
inline void pack_all(View b, int64_t depth, int64_t columns, float* packed) {
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel)
    pack(b, 0, depth, n0, columns - n0 < kPanel ? columns - n0 : kPanel, packed + n0 * depth);
}

// C = A B with B of pack_all, one thread; only the panels that hold columns [first, last).
inline void packed_product(View a, int64_t rows, int64_t depth, const float* packed, int64_t packed_depth,
                           int64_t first, int64_t last, int64_t columns, float* c, int64_t ldc, bool accumulate) {
  for (int64_t n0 = first / kPanel * kPanel; n0 < last; n0 += kPanel)
    panel(rows, depth, a, packed + n0 * packed_depth, c + n0, ldc, columns - n0 < kPanel ? columns - n0 : kPanel,
          accumulate);
}

// In place on s[rows][ld]: probabilities of query i (at place q0 + i) over keys [low_i, q0 + i], zero elsewhere in
// [0, width). Writes the logarithm of each row's normaliser.
inline void causal_softmax(float* s, int64_t ld, int64_t rows, int64_t q0, int64_t width, const Heads& heads,
                           float* log_norm, int64_t log_stride) {
  for (int64_t i = 0; i < rows; i++) {
    float* row = s + i * ld;
    const int64_t end = q0 + i + 1, low = heads.window && end > heads.window ? end - heads.window : 0;
    float best = row[low];
    for (int64_t j = low; j < end; j++) best = row[j] > best ? row[j] : best;
    Vec total{};
    const Vec peak = splat(best);
    over_columns(end - low, [&](int64_t j, int64_t n) {
      Vec e = exp((get(row + low + j, n) - peak) * heads.scale);
      if (n < kLanes) {
        Vec cut{};
        std::memcpy(&cut, &e, n * sizeof(float));
        e = cut;
      }
      total += e;
      put(row + low + j, e, n);
    });
    const float norm = sum(total), inverse = 1.0f / norm;
    over_columns(end - low, [&](int64_t j, int64_t n) { put(row + low + j, get(row + low + j, n) * inverse, n); });
    std::memset(row, 0, low * sizeof(float));
    std::memset(row + end, 0, (width - end) * sizeof(float));
    if (log_norm) log_norm[i * log_stride] = best * heads.scale + std::log(norm);
  }
}

// q [T, query * dim], k and v [T, key * dim], out [T, query * dim], log_norm [T, query] or null; starts [rows + 1].
inline void attend(const float* q, const float* k, const float* v, float* out, float* log_norm, const int64_t* starts,
                   int64_t sequences, const Heads& heads) {
  const int64_t d = heads.dim, dq = heads.query * d, dk = heads.key * d;
  parallel_for(sequences * heads.key, [&](int64_t task) {
    static thread_local Buffer space;
    const int64_t begin = starts[task / heads.key], length = starts[task / heads.key + 1] - begin;
    const int64_t kv = task % heads.key, wide = padded(length), across = padded(d);
    float* keys = space.reserve(wide * d + length * across + kQueryBlock * wide);
    float *values = keys + wide * d, *s = values + length * across;
    pack_all(transposed(k + begin * dk + kv * d, dk), d, length, keys);
    pack_all(plain(v + begin * dk + kv * d, dk), length, d, values);
    for (int64_t h = kv * heads.group(); h < (kv + 1) * heads.group(); h++)
      for (int64_t q0 = 0; q0 < length; q0 += kQueryBlock) {
        const int64_t rows = length - q0 < kQueryBlock ? length - q0 : kQueryBlock, end = q0 + rows;
        const int64_t low = heads.window && q0 >= heads.window ? (q0 - heads.window + 1) / kPanel * kPanel : 0;
        const int64_t at = begin + q0;
        packed_product(plain(q + at * dq + h * d, dq), rows, d, keys, d, low, end, wide, s, wide, false);
        causal_softmax(s, wide, rows, q0, padded(end), heads, log_norm ? log_norm + at * heads.query + h : nullptr,
                       heads.query);
        for (int64_t n0 = 0; n0 < d; n0 += kPanel)
          panel(rows, end - low, plain(s + low, wide), values + n0 * length + low * kPanel, out + at * dq + h * d + n0, dq,
                d - n0 < kPanel ? d - n0 : kPanel, false);
      }
  });
}

// Gradients of attend (Dao et al. 2022, FlashAttention, appendix B: probabilities are made anew from log_norm).
inline void attend_backward(const float* q, const float* k, const float* v, const float* out, const float* log_norm,
                            const float* dout, float* grad_q, float* grad_k, float* grad_v, const int64_t* starts,
                            int64_t sequences, const Heads& heads) {
  const int64_t d = heads.dim, dq = heads.query * d, dk = heads.key * d;
  parallel_for(sequences * heads.key, [&](int64_t task) {
    static thread_local Buffer space;
    const int64_t begin = starts[task / heads.key], length = starts[task / heads.key + 1] - begin;
    const int64_t kv = task % heads.key, wide = padded(length), across = padded(d);
    float* keys = space.reserve(2 * wide * d + length * across + 2 * kQueryBlock * wide + 2 * kQueryBlock * across);
    float *values = keys + wide * d, *key_rows = values + wide * d, *p = key_rows + length * across;
    float *ds = p + kQueryBlock * wide, *queries = ds + kQueryBlock * wide, *douts = queries + kQueryBlock * across;
    const float *ks = k + begin * dk + kv * d, *vs = v + begin * dk + kv * d;
    pack_all(transposed(ks, dk), d, length, keys);
    pack_all(transposed(vs, dk), d, length, values);
    pack_all(plain(ks, dk), length, d, key_rows);
    float *dks = grad_k + begin * dk + kv * d, *dvs = grad_v + begin * dk + kv * d;
    for (int64_t i = 0; i < length; i++) {
      std::memset(dks + i * dk, 0, d * sizeof(float));
      std::memset(dvs + i * dk, 0, d * sizeof(float));
    }
    for (int64_t h = kv * heads.group(); h < (kv + 1) * heads.group(); h++)
      for (int64_t q0 = 0; q0 < length; q0 += kQueryBlock) {
        const int64_t rows = length - q0 < kQueryBlock ? length - q0 : kQueryBlock, end = q0 + rows;
        const int64_t low = heads.window && q0 >= heads.window ? (q0 - heads.window + 1) / kPanel * kPanel : 0;
        const int64_t at = begin + q0;
        const float *qs = q + at * dq + h * d, *os = out + at * dq + h * d, *dos = dout + at * dq + h * d;
        packed_product(plain(qs, dq), rows, d, keys, d, low, end, wide, p, wide, false);
        packed_product(plain(dos, dq), rows, d, values, d, low, end, wide, ds, wide, false);
        for (int64_t i = 0; i < rows; i++) {
          float *pr = p + i * wide, *dr = ds + i * wide;
          const int64_t stop = q0 + i + 1, from = heads.window && stop > heads.window ? stop - heads.window : 0;
          Vec dots{};
          over_columns(d, [&](int64_t j, int64_t n) { dots += get(os + i * dq + j, n) * get(dos + i * dq + j, n); });
          const Vec delta = splat(sum(dots)), norm = splat(log_norm[(at + i) * heads.query + h]);
          over_columns(stop - from, [&](int64_t j, int64_t n) {
            const Vec e = exp(get(pr + from + j, n) * heads.scale - norm);
            put(pr + from + j, e, n);
            put(dr + from + j, e * (get(dr + from + j, n) - delta) * heads.scale, n);
          });
          for (float* row : {pr, dr}) {
            std::memset(row + low, 0, (from > low ? from - low : 0) * sizeof(float));
            std::memset(row + stop, 0, (padded(end) - stop) * sizeof(float));
          }
        }
        pack_all(plain(qs, dq), rows, d, queries);
        pack_all(plain(dos, dq), rows, d, douts);
        for (int64_t n0 = 0; n0 < d; n0 += kPanel) {
          const int64_t columns = d - n0 < kPanel ? d - n0 : kPanel;
          panel(rows, end - low, plain(ds + low, wide), key_rows + n0 * length + low * kPanel,
                grad_q + at * dq + h * d + n0, dq, columns, false);
          panel(end - low, rows, transposed(ds + low, wide), queries + n0 * rows, dks + low * dk + n0, dk, columns, true);
          panel(end - low, rows, transposed(p + low, wide), douts + n0 * rows, dvs + low * dk + n0, dk, columns, true);
        }
      }
  });
}

// The cache of one layer. A token's place is a number below `tokens`; a row's region begins at a multiple of kCacheBlock.
// Keys: [key heads][tokens / kCacheBlock][dim][kCacheBlock], so that the scores of kCacheBlock tokens come out side by
// side; values: [key heads][tokens][dim]. What one head reads of a region lies together, which memory rewards.
struct Cache {
  float *keys, *values;
  int64_t tokens;
};

inline float* key_place(const Cache& cache, int64_t place, int64_t head, const Heads& heads) {
  return cache.keys + (head * cache.tokens + place / kCacheBlock * kCacheBlock) * heads.dim + place % kCacheBlock;
}

inline float* value_place(const Cache& cache, int64_t place, int64_t head, const Heads& heads) {
  return cache.values + (head * cache.tokens + place) * heads.dim;
}

inline void remember(const Cache& cache, int64_t place, const float* k, const float* v, const Heads& heads) {
  for (int64_t h = 0; h < heads.key; h++) {
    float* to = key_place(cache, place, h, heads);
    for (int64_t i = 0; i < heads.dim; i++) to[i * kCacheBlock] = k[h * heads.dim + i];
    std::memcpy(value_place(cache, place, h, heads), v + h * heads.dim, heads.dim * sizeof(float));
  }
}

// A run of tokens in the cache: [place, place + length).
struct Span {
  int64_t place, length;
};

// scores[g][..] of kCacheBlock tokens for G heads that share the keys.
template <int G>
inline void score_block(const float* q, int64_t d, const float* keys, float* scores, int64_t width) {
  constexpr int kParts = kCacheBlock / kLanes;
  Vec acc[G][kParts] = {};
  for (int64_t i = 0; i < d; i++)
    for (int j = 0; j < kParts; j++) {
      const Vec k = load(keys + i * kCacheBlock + j * kLanes);
      for (int g = 0; g < G; g++) acc[g][j] += q[g * d + i] * k;
    }
  for (int g = 0; g < G; g++)
    for (int j = 0; j < kParts; j++) store(scores + g * width + j * kLanes, acc[g][j]);
}

// out[d] += sum over count tokens of weights[j] * v[j * d ..]. Two chains of additions for every vector of four, so
// that the units for multiply-adds do not wait for one another.
inline void mix(const float* weights, const float* v, int64_t count, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    Vec acc[2][4] = {};
    for (int64_t j = 0; j < count; j++)
      for (int c = 0; c < 4; c++) acc[j & 1][c] += weights[j] * load(v + j * d + i + c * kLanes);
    for (int c = 0; c < 4; c++) store(out + i + c * kLanes, load(out + i + c * kLanes) + (acc[0][c] + acc[1][c]));
  }
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    Vec acc[4][2] = {};
    int64_t j = 0;
    for (; j + 4 <= count; j += 4)
      for (int e = 0; e < 4; e++)
        for (int c = 0; c < 2; c++) acc[e][c] += weights[j + e] * load(v + (j + e) * d + i + c * kLanes);
    for (; j < count; j++)
      for (int c = 0; c < 2; c++) acc[0][c] += weights[j] * load(v + j * d + i + c * kLanes);
    for (int c = 0; c < 2; c++)
      store(out + i + c * kLanes, load(out + i + c * kLanes) + ((acc[0][c] + acc[1][c]) + (acc[2][c] + acc[3][c])));
  }
  over_columns(d - i, [&](int64_t at, int64_t n) {
    Vec acc{};
    for (int64_t j = 0; j < count; j++) acc += weights[j] * get(v + j * d + i + at, n);
    put(out + i + at, get(out + i + at, n) + acc, n);
  });
}

// One query token of each row over the row's two spans (the shared prompt, then its own answer). q, out [rows, query * dim].
inline void attend_cache(const float* q, const Cache& cache, const Span* spans, int64_t rows, const Heads& heads,
                         float* out) {
  const int64_t d = heads.dim, group = heads.group();
  parallel_for(rows * heads.key, [&](int64_t task) {
    static thread_local Buffer space;
    const int64_t row = task / heads.key, kv = task % heads.key;
    Span seen[2] = {spans[2 * row], spans[2 * row + 1]};
    int64_t skip = heads.window && seen[0].length + seen[1].length > heads.window
                       ? seen[0].length + seen[1].length - heads.window
                       : 0;
    // whole blocks are scored; what lies outside of a span or of the window is left out of the softmax
    int64_t width = 0;
    for (const Span& span : seen) width += (span.length + kCacheBlock - 1) / kCacheBlock * kCacheBlock;
    float* scores = space.reserve(group * width + heads.dim);
    const float* mine = q + (row * heads.query + kv * group) * d;
    int64_t at = 0;
    for (const Span& span : seen)
      for (int64_t t = 0; t < span.length; t += kCacheBlock, at += kCacheBlock) {
        const float* keys = key_place(cache, span.place + t, kv, heads);
        int64_t g = 0;
        for (; g + 4 <= group; g += 4) score_block<4>(mine + g * d, d, keys, scores + g * width + at, width);
        for (; g + 2 <= group; g += 2) score_block<2>(mine + g * d, d, keys, scores + g * width + at, width);
        for (; g < group; g++) score_block<1>(mine + g * d, d, keys, scores + g * width + at, width);
      }
    for (int64_t g = 0; g < group; g++) {
      float* s = scores + g * width;
      float best = -INFINITY;
      auto each_run = [&](auto&& f) {  // f(scores, place, count) of the tokens that count
        int64_t base = 0, left = skip;
        for (const Span& span : seen) {
          const int64_t cut = left < span.length ? left : span.length;
          if (cut < span.length) f(s + base + cut, span.place + cut, span.length - cut);
          left -= cut;
          base += (span.length + kCacheBlock - 1) / kCacheBlock * kCacheBlock;
        }
      };
      each_run([&](float* run, int64_t, int64_t count) {
        for (int64_t j = 0; j < count; j++) best = run[j] > best ? run[j] : best;
      });
      const Vec peak = splat(best);
      float norm = 0;
      each_run([&](float* run, int64_t, int64_t count) {
        Vec total{};
        over_columns(count, [&](int64_t j, int64_t n) {
          const Vec e = exp((get(run + j, n) - peak) * heads.scale);
          put(run + j, e, n);
          total += get(run + j, n);
        });
        norm += sum(total);
      });
      float* to = out + (row * heads.query + kv * group + g) * d;
      const float inverse = 1.0f / norm;
      std::memset(to, 0, d * sizeof(float));
      each_run([&](float* run, int64_t place, int64_t count) {
        mix(run, value_place(cache, place, kv, heads), count, d, to);
      });
      over_columns(d, [&](int64_t i, int64_t n) { put(to + i, get(to + i, n) * inverse, n); });
    }
  });
}

}  // namespace alignment
