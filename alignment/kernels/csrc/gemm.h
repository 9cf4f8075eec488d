// C = A B (+ C) in float32. K is cut into blocks; a block's sum is one chain of multiply-adds in ascending order, and the
// blocks are added up in order. So a row's result does not depend on the other rows, on the number of threads or on where
// the row stands: batches of any composition give the same bits. (Sums of blocks also lose fewer digits than one chain.)
#pragma once

#include "simd.h"
#include "threads.h"

namespace alignment {

constexpr int64_t kDepth = 256;      // K is cut into blocks of this; a packed panel of B is kDepth * kPanel floats
constexpr int64_t kRowBlock = 240;   // rows of A per task: 240 x 256 floats stay in a level-2 cache

// Element (i, j) lies at p[i * rows + j * columns]; one of the two strides is 1.
struct View {
  const float* p;
  int64_t rows, columns;
};

inline View plain(const float* p, int64_t width) { return {p, width, 1}; }
inline View transposed(const float* p, int64_t width) { return {p, 1, width}; }

constexpr int64_t kAhead = 24;  // rows of B that are fetched before they are needed

// Where a tile finds B: packed before, or where it lies, in rows of `width`; then what was read is packed for the tiles
// that follow, so that waiting for memory and computing overlap.
struct Packed {
  const float* b;
  Vec at(int64_t k, int j) const { return load(b + k * kPanel + j * kLanes); }
};
struct Unpacked {
  const float* b;
  int64_t width;
  float* packed;
  Vec at(int64_t k, int j) const {
    const float* line = b + k * width + j * kLanes;
    // a panel is a narrow strip of wide rows, whose next lines the hardware does not foresee
    __builtin_prefetch(line + kAhead * width);
    const Vec v = load(line);
    store(packed + k * kPanel + j * kLanes, v);
    return v;
  }
};

template <int MR, bool kAcross, class B>
inline void tile(int64_t depth, const float* a, int64_t stride, B b, float* c, int64_t ldc, int64_t columns,
                 bool accumulate) {
  Vec acc[MR][kVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vec right[kVectors];
    for (int j = 0; j < kVectors; j++) right[j] = b.at(k, j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const Vec left = splat(kAcross ? a[k * stride + i] : a[i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) acc[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < MR; i++) {
    float* row = c + i * ldc;
    if (columns == kPanel) {
      for (int j = 0; j < kVectors; j++)
        store(row + j * kLanes, accumulate ? load(row + j * kLanes) + acc[i][j] : acc[i][j]);
      continue;
    }
    float part[kPanel];
    for (int j = 0; j < kVectors; j++) store(part + j * kLanes, acc[i][j]);
    for (int64_t j = 0; j < columns; j++) row[j] = accumulate ? row[j] + part[j] : part[j];
  }
}

template <bool kAcross, class B>
inline int64_t one_tile(int64_t m, int64_t rows, int64_t depth, View a, B b, float* c, int64_t ldc, int64_t columns,
                        bool accumulate) {
  const int64_t left = rows - m, stride = kAcross ? a.columns : a.rows;
  const float* from = a.p + m * a.rows;
  float* to = c + m * ldc;
#define ALIGNMENT_TILE(HEIGHT)                                                         \
  if (left >= HEIGHT) {                                                                \
    tile<HEIGHT, kAcross, B>(depth, from, stride, b, to, ldc, columns, accumulate);    \
    return m + HEIGHT;                                                                 \
  }
  ALIGNMENT_TILE(kRowsPerTile)
  if (kRowsPerTile > 8) {
    ALIGNMENT_TILE(8)
  }
  ALIGNMENT_TILE(4)
  ALIGNMENT_TILE(2)
  ALIGNMENT_TILE(1)
#undef ALIGNMENT_TILE
  return rows;
}

template <bool kAcross>
inline void panel_from(int64_t m, int64_t rows, int64_t depth, View a, const float* b, float* c, int64_t ldc,
                       int64_t columns, bool accumulate) {
  while (m < rows) m = one_tile<kAcross>(m, rows, depth, a, Packed{b}, c, ldc, columns, accumulate);
}

// One panel of C: `rows` rows, `columns` <= kPanel; b is packed [depth][kPanel].
inline void panel(int64_t rows, int64_t depth, View a, const float* b, float* c, int64_t ldc, int64_t columns,
                  bool accumulate) {
  if (a.columns == 1)
    panel_from<false>(0, rows, depth, a, b, c, ldc, columns, accumulate);
  else
    panel_from<true>(0, rows, depth, a, b, c, ldc, columns, accumulate);
}

// The same with B where it lies, kPanel columns in rows of `width`, packed on the way.
inline void panel_packing(int64_t rows, int64_t depth, View a, const float* b, int64_t width, float* packed, float* c,
                          int64_t ldc, bool accumulate) {
  const Unpacked first{b, width, packed};
  if (a.columns == 1) {
    const int64_t m = one_tile<false>(0, rows, depth, a, first, c, ldc, kPanel, accumulate);
    panel_from<false>(m, rows, depth, a, packed, c, ldc, kPanel, accumulate);
  } else {
    const int64_t m = one_tile<true>(0, rows, depth, a, first, c, ldc, kPanel, accumulate);
    panel_from<true>(m, rows, depth, a, packed, c, ldc, kPanel, accumulate);
  }
}

// Rows become columns: kLanes vectors, by repeated perfect shuffles of the first half with the second.
inline void transpose(Vec* rows) {
  Vec turned[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; i++) {
      turned[2 * i] = first_halves(rows[i], rows[i + kLanes / 2]);
      turned[2 * i + 1] = second_halves(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = turned[i];
  }
}

// b[depth][kPanel] = B(k0.., n0..), zeros behind the last column.
inline void pack(View b, int64_t k0, int64_t depth, int64_t n0, int64_t columns, float* packed) {
  if (b.columns == 1) {
    const float* from = b.p + k0 * b.rows + n0;
    for (int64_t k = 0; k < depth; k++) {
      std::memcpy(packed + k * kPanel, from + k * b.rows, columns * sizeof(float));
      if (columns < kPanel) std::memset(packed + k * kPanel + columns, 0, (kPanel - columns) * sizeof(float));
    }
    return;
  }
  // a transposition: k is contiguous in memory
  const float* from = b.p + n0 * b.columns + k0;
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes)
    for (int j = 0; j < kVectors; j++) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int64_t n = j * kLanes + i;
        rows[i] = n < columns ? load(from + n * b.columns + k) : Vec{};
      }
      transpose(rows);
      for (int i = 0; i < kLanes; i++) store(packed + (k + i) * kPanel + j * kLanes, rows[i]);
    }
  for (; k < depth; k++)
    for (int64_t n = 0; n < kPanel; n++) packed[k * kPanel + n] = n < columns ? from[n * b.columns + k] : 0.f;
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
    const View part{a.p + m0 * a.rows + k0 * a.columns, a.rows, a.columns};
    float* to = c + m0 * ldc + n0;
    const bool add = accumulate || k0 > 0;
    if (b.columns == 1 && columns == kPanel) {
      panel_packing(m1 - m0, deep, part, b.p + k0 * b.rows + n0, b.rows, packed, to, ldc, add);
    } else {
      pack(b, k0, deep, n0, columns, packed);
      panel(m1 - m0, deep, part, packed, to, ldc, columns, add);
    }
  }
}

// Few rows: every weight is used once or a few times, so the time is that of reading B. Strips of B as wide as the
// registers allow are read in place; each element is the same chain of multiply-adds as in a tile.
constexpr int64_t kFewRows = 4;
constexpr int64_t kStrip = 4 * kLanes;

template <int R>
inline void strip(int64_t depth, const float* a, int64_t stride, const float* b, int64_t width, float* c, int64_t ldc,
                  int64_t columns, bool accumulate) {
  if (columns == kStrip) {
    Vec acc[R][4] = {};
    for (int64_t k = 0; k < depth; k++)
      for (int j = 0; j < 4; j++) {
        __builtin_prefetch(b + (k + kAhead) * width + j * kLanes);
        const Vec right = load(b + k * width + j * kLanes);
        for (int r = 0; r < R; r++) acc[r][j] += splat(a[r * stride + k]) * right;
      }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) {
        float* to = c + r * ldc + j * kLanes;
        store(to, accumulate ? load(to) + acc[r][j] : acc[r][j]);
      }
    return;
  }
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t some = columns - n < kLanes ? columns - n : kLanes;
    for (int r = 0; r < R; r++) {
      Vec one{};
      for (int64_t k = 0; k < depth; k++) one += splat(a[r * stride + k]) * load_some(b + k * width + n, some);
      float* to = c + r * ldc + n;
      store_some(to, accumulate ? load_some(to, some) + one : one, some);
    }
  }
}

inline void strip_task(View a, int64_t rows, View b, int64_t n0, int64_t columns, int64_t depth, float* c, int64_t ldc,
                       bool accumulate) {
  float* to = c + n0;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t deep = depth - k0 < kDepth ? depth - k0 : kDepth;
    const float *left = a.p + k0, *from = b.p + k0 * b.rows + n0;
    const bool add = accumulate || k0 > 0;
    switch (rows) {
      case 1: strip<1>(deep, left, a.rows, from, b.rows, to, ldc, columns, add); break;
      case 2: strip<2>(deep, left, a.rows, from, b.rows, to, ldc, columns, add); break;
      case 3: strip<3>(deep, left, a.rows, from, b.rows, to, ldc, columns, add); break;
      default: strip<4>(deep, left, a.rows, from, b.rows, to, ldc, columns, add);
    }
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
  bool in_place = rows <= kFewRows && a.columns == 1;
  for (int i = 0; i < count; i++) in_place = in_place && products[i].b.columns == 1;
  const int64_t width = in_place ? kStrip : kPanel;
  auto pieces = [&](int i) { return (products[i].columns + width - 1) / width; };
  int64_t wide = 0;
  for (int i = 0; i < count; i++) wide += pieces(i);
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
    while (at >= pieces(i)) at -= pieces(i++);
    const Product& one = products[i];
    const int64_t n0 = at * width, columns = one.columns - n0 < width ? one.columns - n0 : width;
    if (in_place)
      strip_task(a, rows, one.b, n0, columns, depth, one.c, one.ldc, accumulate);
    else
      gemm_task(a, one.b, m0, m1, n0, columns, depth, one.c, one.ldc, accumulate);
  });
}

inline void gemm(View a, int64_t rows, int64_t depth, View b, int64_t columns, float* c, int64_t ldc,
                 bool accumulate = false) {
  const Product one{b, columns, c, ldc};
  gemm(a, rows, depth, &one, 1, accumulate);
}

}  // namespace alignment
