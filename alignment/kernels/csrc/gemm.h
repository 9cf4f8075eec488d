// C = A B (+ C) in float32. Every element of C is one chain of multiply-adds over K in ascending order, so a row's
// result does not depend on the other rows, on the number of threads or on where the row stands: batches of any
// composition give the same bits.
#pragma once

#include "simd.h"
#include "threads.h"

namespace alignment {

constexpr int64_t kDepth = 512;      // K is cut into blocks of this; a packed panel of B is kDepth * kPanel floats
constexpr int64_t kRowBlock = 240;   // rows of A per task: 240 x 512 floats stay in a level-2 cache

// Element (i, j) lies at p[i * rows + j * columns]; one of the two strides is 1.
struct View {
  const float* p;
  int64_t rows, columns;
};

inline View plain(const float* p, int64_t width) { return {p, width, 1}; }
inline View transposed(const float* p, int64_t width) { return {p, 1, width}; }

template <int MR, bool kAcross>
inline void tile(int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t ldc, int64_t columns,
                 bool accumulate) {
  Vec acc[MR][kVectors];
  if (columns == kPanel) {
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < kVectors; j++) acc[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Vec{};
  } else {
    float part[kPanel];
    for (int i = 0; i < MR; i++) {
      std::memset(part, 0, sizeof(part));
      if (accumulate) std::memcpy(part, c + i * ldc, columns * sizeof(float));
      for (int j = 0; j < kVectors; j++) acc[i][j] = load(part + j * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; k++) {
    Vec right[kVectors];
    for (int j = 0; j < kVectors; j++) right[j] = load(b + k * kPanel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const Vec left = splat(kAcross ? a[k * stride + i] : a[i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) acc[i][j] += left * right[j];
    }
  }
  if (columns == kPanel) {
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < kVectors; j++) store(c + i * ldc + j * kLanes, acc[i][j]);
  } else {
    float part[kPanel];
    for (int i = 0; i < MR; i++) {
      for (int j = 0; j < kVectors; j++) store(part + j * kLanes, acc[i][j]);
      std::memcpy(c + i * ldc, part, columns * sizeof(float));
    }
  }
}

template <int MR, bool kAcross>
inline int64_t tiles(int64_t m, int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c,
                     int64_t ldc, int64_t columns, bool accumulate) {
  for (; m + MR <= rows; m += MR)
    tile<MR, kAcross>(depth, a + (kAcross ? m : m * stride), stride, b, c + m * ldc, ldc, columns, accumulate);
  return m;
}

// One panel of C: `rows` rows, `columns` <= kPanel; b is packed [depth][kPanel].
inline void panel(int64_t rows, int64_t depth, View a, const float* b, float* c, int64_t ldc, int64_t columns,
                  bool accumulate) {
  int64_t m = 0;
#define ALIGNMENT_TILES(ACROSS, STRIDE)                                                                 \
  m = tiles<kRowsPerTile, ACROSS>(m, rows, depth, a.p, STRIDE, b, c, ldc, columns, accumulate);         \
  if (kRowsPerTile > 8) m = tiles<8, ACROSS>(m, rows, depth, a.p, STRIDE, b, c, ldc, columns, accumulate); \
  m = tiles<4, ACROSS>(m, rows, depth, a.p, STRIDE, b, c, ldc, columns, accumulate);                    \
  m = tiles<2, ACROSS>(m, rows, depth, a.p, STRIDE, b, c, ldc, columns, accumulate);                    \
  m = tiles<1, ACROSS>(m, rows, depth, a.p, STRIDE, b, c, ldc, columns, accumulate);
  if (a.columns == 1) {
    ALIGNMENT_TILES(false, a.rows)
  } else {
    ALIGNMENT_TILES(true, a.columns)
  }
#undef ALIGNMENT_TILES
}

// b[depth][kPanel] = B(k0.., n0..), zeros behind the last column.
inline void pack(View b, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* packed) {
  if (b.columns == 1) {
    const float* from = b.p + k0 * b.rows + n0;
    if (columns == kPanel) {
      for (int64_t k = 0; k < depth; k++)
        for (int j = 0; j < kVectors; j++)
          store(packed + k * kPanel + j * kLanes, load(from + k * b.rows + j * kLanes));
      return;
    }
    for (int64_t k = 0; k < depth; k++) {
      std::memcpy(packed + k * kPanel, from + k * b.rows, columns * sizeof(float));
      std::memset(packed + k * kPanel + columns, 0, (kPanel - columns) * sizeof(float));
    }
    return;
  }
  // a transposition: k is contiguous in memory; blocks of 16 x 16 use each cache line once
  const float* from = b.p + n0 * b.columns + k0;
  for (int64_t k = 0; k < depth; k += 16) {
    const int64_t deep = depth - k < 16 ? depth - k : 16;
    for (int64_t n = 0; n < columns; n++) {
      const float* line = from + n * b.columns + k;
      float* to = packed + k * kPanel + n;
      for (int64_t i = 0; i < deep; i++) to[i * kPanel] = line[i];
    }
  }
  for (int64_t n = columns; n < kPanel; n++)
    for (int64_t k = 0; k < depth; k++) packed[k * kPanel + n] = 0.f;
}

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t padded(int64_t columns) { return panels(columns) * kPanel; }

inline float* packing_space() {
  static thread_local Buffer space;
  return space.reserve(kDepth * kPanel);
}

// Rows [m0, m1) of one panel of C = A B, packing B as it goes.
inline void gemm_task(View a, View b, int64_t m0, int64_t m1, int64_t n0, int64_t columns, int64_t depth, float* c,
                      int64_t ldc, bool accumulate) {
  float* packed = packing_space();
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t deep = depth - k0 < kDepth ? depth - k0 : kDepth;
    pack(b, k0, deep, n0, columns, packed);
    const View part{a.p + m0 * a.rows + k0 * a.columns, a.rows, a.columns};
    panel(m1 - m0, deep, part, packed, c + m0 * ldc + n0, ldc, columns, accumulate || k0 > 0);
  }
}

// A product of a list of them that share A: C_i = A B_i (+ C_i).
struct Product {
  View b;
  int64_t columns;
  float* c;
  int64_t ldc;
};

// The products of one A with several B, all cores.
inline void gemm(View a, int64_t rows, int64_t depth, const Product* products, int count, bool accumulate = false) {
  if (rows == 0) return;
  int64_t wide = 0;
  for (int i = 0; i < count; i++) wide += panels(products[i].columns);
  const int64_t threads = omp_get_max_threads();
  int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  while (blocks * wide < 2 * threads && rows / (blocks + 1) >= kRowsPerTile) blocks++;
  int64_t height = (rows + blocks - 1) / blocks;
  height = (height + kRowsPerTile - 1) / kRowsPerTile * kRowsPerTile;
  blocks = (rows + height - 1) / height;
  parallel_for(blocks * wide, [&](int64_t task) {
    const int64_t m0 = task / wide * height, m1 = m0 + height < rows ? m0 + height : rows;
    int64_t at = task % wide;
    int i = 0;
    while (at >= panels(products[i].columns)) at -= panels(products[i++].columns);
    const Product& one = products[i];
    const int64_t n0 = at * kPanel, columns = one.columns - n0 < kPanel ? one.columns - n0 : kPanel;
    gemm_task(a, one.b, m0, m1, n0, columns, depth, one.c, one.ldc, accumulate);
  });
}

inline void gemm(View a, int64_t rows, int64_t depth, View b, int64_t columns, float* c, int64_t ldc,
                 bool accumulate = false) {
  const Product one{b, columns, c, ldc};
  gemm(a, rows, depth, &one, 1, accumulate);
}

}  // namespace alignment
