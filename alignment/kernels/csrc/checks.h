// What an operator is given is checked before anything is read: sizes against each other, and the numbers that say where
// memory is read (ids, positions, places). A call costs some comparisons for each tensor and each token.
#pragma once

#include "layer.h"
#include "paddle/extension.h"

namespace alignment {

// The text is made only when it is needed.
#define ALIGNMENT_NEED(condition, ...) PD_CHECK(condition, "CPU kernels: ", __VA_ARGS__)

inline void need_size(const paddle::Tensor& t, int64_t wanted, const char* name) {
  ALIGNMENT_NEED(t.numel() == wanted, name, " has ", t.numel(), " numbers; ", wanted, " are wanted");
}

// [rows, width], of any number of rows; returns it.
inline int64_t need_rows(const paddle::Tensor& t, int64_t width, const char* name) {
  const auto dims = t.shape();
  ALIGNMENT_NEED(dims.size() == 2 && dims[1] == width, name, " must be [rows, ", width, "], got ",
                 dims.size() == 2 ? dims[1] : -1, " columns in ", dims.size(), " dimensions");
  return dims[0];
}

inline void need_below(const int64_t* numbers, int64_t count, int64_t least, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; i++)
    ALIGNMENT_NEED(numbers[i] >= least && numbers[i] < end, name, " ", numbers[i], " (number ", i,
                   ") must be at least ", least, " and below ", end);
}

// The numbers of ops.py's LayerShape.
inline void need_shape(const std::vector<int64_t>& shape) {
  ALIGNMENT_NEED(shape.size() == 9, "a layer's shape is 9 numbers, got ", shape.size());
  for (int i = 0; i < 5; i++) ALIGNMENT_NEED(shape[i] > 0, "number ", i, " of a layer's shape is ", shape[i]);
  ALIGNMENT_NEED(shape[2] % shape[3] == 0, shape[2], " query heads are no multiple of ", shape[3], " key heads");
  ALIGNMENT_NEED(shape[5] >= 0, "the window is ", shape[5]);
  ALIGNMENT_NEED(shape[6] == 0 || shape[6] == 1, "there is no activation ", shape[6]);
}

// Weights of whole layers, or gradients shaped like them; returns how many layers.
inline int64_t need_layers(const std::vector<paddle::Tensor>& tensors, const Shape& s, bool biases, const char* name) {
  const int64_t h = s.hidden, q = s.query_width(), k = s.key_width(), m = s.intermediate;
  const int64_t wanted[12] = {h, h * q, h * k, h * k, q * h, h, h * m, h * m, m * h, q, k, k};
  const size_t each = biases ? 12 : 9;
  ALIGNMENT_NEED(!tensors.empty() && tensors.size() % each == 0, name, ": ", tensors.size(),
                 " tensors are no layers of ", each);
  for (size_t i = 0; i < tensors.size(); i++)
    ALIGNMENT_NEED(tensors[i].numel() == wanted[i % each], name, ": tensor ", i % each, " of layer ", i / each, " has ",
                   tensors[i].numel(), " numbers; ", wanted[i % each], " are wanted");
  return static_cast<int64_t>(tensors.size() / each);
}

// Tables of cosines and sines [positions, dim / 2]; every token's position is in them.
inline void need_angles(const paddle::Tensor& cosine, const paddle::Tensor& sine, const Shape& s,
                        const int64_t* positions, int64_t rows) {
  const int64_t reach = need_rows(cosine, s.heads.dim / 2, "the table of cosines");
  need_size(sine, cosine.numel(), "the table of sines");
  need_below(positions, rows, 0, reach, "position");
}

// Where packed sequences begin: from 0 upwards, T at the end.
inline void need_starts(const int64_t* starts, int64_t sequences, int64_t rows) {
  ALIGNMENT_NEED(starts[0] == 0 && starts[sequences] == rows, "the sequences begin at ", starts[0], " and end at ",
                 starts[sequences], " of ", rows, " tokens");
  for (int64_t i = 0; i < sequences; i++)
    ALIGNMENT_NEED(starts[i] <= starts[i + 1], "sequence ", i, " ends before it begins");
}

// Runs of the cache, two for each row; keys lie in whole blocks.
inline void need_spans(const Span* spans, int64_t count, int64_t tokens) {
  for (int64_t i = 0; i < count; i++) {
    const Span& span = spans[i];
    if (span.length == 0) continue;
    ALIGNMENT_NEED(span.length > 0 && span.place >= 0 && span.place % kCacheBlock == 0 &&
                       span.place + span.length <= tokens,
                   "span ", i % 2, " of row ", i / 2, " is ", span.length, " tokens from place ", span.place,
                   " of a cache of ", tokens, " (a span begins at a multiple of ", kCacheBlock, ")");
  }
}

}  // namespace alignment
