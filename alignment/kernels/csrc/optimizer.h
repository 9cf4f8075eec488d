// AdamW over many tensors in one pass of each: decay, clipping, both moments and the step (Loshchilov and Hutter 2019,
// "Decoupled Weight Decay Regularization", algorithm 2; the bias corrections folded into rate and epsilon as Kingma and
// Ba 2015 suggest at the end of section 2). And the sum of squares that clipping needs.
#pragma once

#include <vector>

#include "pointwise.h"

namespace alignment {

constexpr int64_t kPiece = 1 << 15;  // floats of a task: 128 KB of each of four arrays

// Where each task of kPiece floats lies.
struct Piece {
  int64_t tensor, begin, end;
};

inline std::vector<Piece> pieces_of(const std::vector<int64_t>& sizes) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < sizes.size(); t++)
    for (int64_t i = 0; i < sizes[t]; i += kPiece)
      pieces.push_back({static_cast<int64_t>(t), i, sizes[t] - i < kPiece ? sizes[t] : i + kPiece});
  return pieces;
}

// Sums of squares in a fixed order: 16 or fewer lanes over at most kPiece floats, then doubles.
inline double square_sum(const std::vector<const float*>& arrays, const std::vector<int64_t>& sizes) {
  const std::vector<Piece> pieces = pieces_of(sizes);
  std::vector<double> sums(pieces.size());
  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[i];
    const float* x = arrays[piece.tensor] + piece.begin;
    Vec total{};
    over_columns(piece.end - piece.begin, [&](int64_t j, int64_t n) {
      const Vec v = get(x + j, n);
      total += v * v;
    });
    sums[i] = sum(total);
  });
  double total = 0;
  for (double part : sums) total += part;
  return total;
}

struct AdamW {
  float rate, beta1, beta2, epsilon, scale;  // scale: what gradients are multiplied by
};

struct AdamTensor {
  float *weight, *first, *second;  // the moments
  const float* grad;
  float decay;              // weight decay, 0 for none
  float power1, power2;     // beta1 and beta2 to the number of this step
};

inline void adamw(const std::vector<AdamTensor>& tensors, const std::vector<int64_t>& sizes, const AdamW& how) {
  const std::vector<Piece> pieces = pieces_of(sizes);
  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[i];
    const AdamTensor& t = tensors[piece.tensor];
    const float root = std::sqrt(1.0f - t.power2), keep = 1.0f - how.rate * t.decay;
    const float rate = how.rate * root / (1.0f - t.power1), epsilon = how.epsilon * root;
    over_columns(piece.end - piece.begin, [&](int64_t j, int64_t n) {
      const int64_t at = piece.begin + j;
      const Vec g = get(t.grad + at, n) * how.scale;
      const Vec m = get(t.first + at, n) * how.beta1 + g * (1.0f - how.beta1);
      const Vec v = get(t.second + at, n) * how.beta2 + g * g * (1.0f - how.beta2);
      Vec bottom;
      for (int e = 0; e < kLanes; e++) bottom[e] = std::sqrt(v[e]);
      put(t.first + at, m, n);
      put(t.second + at, v, n);
      put(t.weight + at, get(t.weight + at, n) * keep - rate * m / (bottom + epsilon), n);
    });
  });
}

}  // namespace alignment
