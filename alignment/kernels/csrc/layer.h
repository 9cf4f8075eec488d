// One decoder layer of the Llama family (Llama, Qwen2, Mistral, Gemma): norm, q/k/v, rotary positions, attention,
// output, residual; norm, gate and up, activation, down, residual. Forward for rollout and scoring, forward and
// backward for training. Weights are [in, out], as Paddle's Linear has them, and are read where they lie.
//
// A rounded layer is a bfloat16 model's: weights are bfloat16 numbers, and so become the outputs of norms and products
// (biases included), what the output and down products read, and the residual stream behind the layer. Gradients pass
// through the rounding unchanged.
#pragma once

#include "attention.h"

namespace alignment {

struct Shape {
  int64_t hidden, intermediate;
  Heads heads;
  Activation activation;
  float epsilon, norm_offset;
  bool rounded;
  int64_t query_width() const { return heads.query * heads.dim; }
  int64_t key_width() const { return heads.key * heads.dim; }
};

struct Layer {
  const float *norm1, *q, *k, *v, *output, *norm2, *gate, *up, *down;
  const float *q_bias, *k_bias, *v_bias;  // null without
};

// Cosines and sines [positions, dim / 2].
struct Angles {
  const float *cosine, *sine;
};

inline void add_rows(float* x, const float* bias, int64_t width) {
  over_columns(width, [&](int64_t i, int64_t n) { put(x + i, get(x + i, n) + get(bias + i, n), n); });
}

inline void round_row(float* x, int64_t width) {
  over_columns(width, [&](int64_t i, int64_t n) { put(x + i, nearest_bfloat16(get(x + i, n)), n); });
}

// q, k, v of normed rows, with bias and rotary positions.
inline void project(const Layer& w, const Shape& s, const float* normed, const Angles& angles, const int64_t* positions,
                    int64_t rows, float* q, float* k, float* v) {
  const int64_t dq = s.query_width(), dk = s.key_width();
  const Product products[3] = {{plain(w.q, dq), dq, q, dq}, {plain(w.k, dk), dk, k, dk}, {plain(w.v, dk), dk, v, dk}};
  gemm(plain(normed, s.hidden), rows, s.hidden, products, 3);
  const int64_t half = s.heads.dim / 2;
  parallel_rows(rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      if (w.q_bias) {
        add_rows(q + r * dq, w.q_bias, dq);
        add_rows(k + r * dk, w.k_bias, dk);
        add_rows(v + r * dk, w.v_bias, dk);
      }
      if (s.rounded) {
        round_row(q + r * dq, dq);
        round_row(k + r * dk, dk);
        round_row(v + r * dk, dk);
      }
      const float *c = angles.cosine + positions[r] * half, *si = angles.sine + positions[r] * half;
      rotate(q + r * dq, c, si, s.heads.query, s.heads.dim, 1.f);
      rotate(k + r * dk, c, si, s.heads.key, s.heads.dim, 1.f);
    }
  });
}

// Where rows get their context from: other rows of the call (packed sequences) or the cache.
struct Context {
  const int64_t* positions;  // [rows]
  const int64_t* places;     // [rows] in the cache, -1: not kept; null: nothing is kept
  const int64_t* starts;     // packed: [sequences + 1]
  int64_t sequences;
  const Span* spans;         // cached: [rows][2]; null: packed
};

// y = attention(norm(x)) Wo, added to y when `add`. Where it is not added, whoever sums the parts rounds them.
inline void attention_part(const Layer& w, const Shape& s, const float* x, const Angles& angles, const Context& context,
                           const Cache* cache, int64_t rows, float* space, float* y, bool add) {
  const int64_t dq = s.query_width(), dk = s.key_width();
  float *normed = space, *q = normed + rows * s.hidden, *k = q + rows * dq, *v = k + rows * dk, *mixed = v + rows * dk;
  rms_norm(x, w.norm1, s.norm_offset, s.epsilon, normed, nullptr, rows, s.hidden);
  if (s.rounded) round_all(normed, rows * s.hidden);
  project(w, s, normed, angles, context.positions, rows, q, k, v);
  if (context.places && cache)
    parallel_rows(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        if (context.places[r] >= 0) remember(*cache, context.places[r], k + r * dk, v + r * dk, s.heads);
    });
  if (context.spans)
    attend_cache(q, *cache, context.spans, rows, s.heads, mixed);
  else
    attend(q, k, v, mixed, nullptr, context.starts, context.sequences, s.heads);
  if (s.rounded) round_all(mixed, rows * dq);
  if (!s.rounded || !add) {
    gemm(plain(mixed, dq), rows, dq, plain(w.output, s.hidden), s.hidden, y, s.hidden, add);
    return;
  }
  gemm(plain(mixed, dq), rows, dq, plain(w.output, s.hidden), s.hidden, normed, s.hidden);
  round_all(normed, rows * s.hidden);
  add_all(y, normed, rows * s.hidden, false);
}

// y = down(act(gate(norm(x))) * up(norm(x))), added to y when `add`.
inline void mlp_part(const Layer& w, const Shape& s, const float* x, int64_t rows, float* space, float* y, bool add) {
  const int64_t wide = s.intermediate;
  float *normed = space, *gates = normed + rows * s.hidden, *ups = gates + rows * wide;
  rms_norm(x, w.norm2, s.norm_offset, s.epsilon, normed, nullptr, rows, s.hidden);
  if (s.rounded) round_all(normed, rows * s.hidden);
  const Product products[2] = {{plain(w.gate, wide), wide, gates, wide}, {plain(w.up, wide), wide, ups, wide}};
  gemm(plain(normed, s.hidden), rows, s.hidden, products, 2);
  if (s.rounded) {
    round_all(gates, rows * wide);
    round_all(ups, rows * wide);
  }
  gate(s.activation, gates, ups, gates, rows * wide);
  if (s.rounded) round_all(gates, rows * wide);
  if (!s.rounded || !add) {
    gemm(plain(gates, wide), rows, wide, plain(w.down, s.hidden), s.hidden, y, s.hidden, add);
    return;
  }
  gemm(plain(gates, wide), rows, wide, plain(w.down, s.hidden), s.hidden, normed, s.hidden);
  round_all(normed, rows * s.hidden);
  add_all(y, normed, rows * s.hidden, true);
}

inline int64_t part_space(const Shape& s, int64_t rows) {
  const int64_t attention = s.hidden + 2 * s.query_width() + 2 * s.key_width(), mlp = s.hidden + 2 * s.intermediate;
  return rows * (attention > mlp ? attention : mlp);
}

// What the backward needs of a layer's forward; all [T, ...] of the packed rows.
struct Saved {
  float *scale1, *q, *k, *v, *log_norm, *mixed, *middle, *scale2, *gates, *ups;
};

inline void layer_forward(const Layer& w, const Shape& s, const float* x, const Angles& angles, const int64_t* positions,
                          const int64_t* starts, int64_t sequences, int64_t rows, const Saved& saved, float* y) {
  const int64_t dq = s.query_width(), wide = s.intermediate, bytes = rows * s.hidden * sizeof(float);
  Buffer space(rows * (s.hidden > wide ? s.hidden : wide));
  rms_norm(x, w.norm1, s.norm_offset, s.epsilon, space.data(), saved.scale1, rows, s.hidden);
  if (s.rounded) round_all(space.data(), rows * s.hidden);
  project(w, s, space.data(), angles, positions, rows, saved.q, saved.k, saved.v);
  attend(saved.q, saved.k, saved.v, saved.mixed, saved.log_norm, starts, sequences, s.heads);
  std::memcpy(saved.middle, x, bytes);
  if (s.rounded) {
    round_all(saved.mixed, rows * dq);
    gemm(plain(saved.mixed, dq), rows, dq, plain(w.output, s.hidden), s.hidden, y, s.hidden);
    round_all(y, rows * s.hidden);
    add_all(saved.middle, y, rows * s.hidden, false);
  } else {
    gemm(plain(saved.mixed, dq), rows, dq, plain(w.output, s.hidden), s.hidden, saved.middle, s.hidden, true);
  }
  rms_norm(saved.middle, w.norm2, s.norm_offset, s.epsilon, space.data(), saved.scale2, rows, s.hidden);
  if (s.rounded) round_all(space.data(), rows * s.hidden);
  const Product products[2] = {{plain(w.gate, wide), wide, saved.gates, wide}, {plain(w.up, wide), wide, saved.ups, wide}};
  gemm(plain(space.data(), s.hidden), rows, s.hidden, products, 2);
  if (s.rounded) {
    round_all(saved.gates, rows * wide);
    round_all(saved.ups, rows * wide);
  }
  gate(s.activation, saved.gates, saved.ups, space.data(), rows * wide);
  if (s.rounded) {
    round_all(space.data(), rows * wide);
    gemm(plain(space.data(), wide), rows, wide, plain(w.down, s.hidden), s.hidden, y, s.hidden);
    round_all(y, rows * s.hidden);
    add_all(y, saved.middle, rows * s.hidden, true);
    return;
  }
  std::memcpy(y, saved.middle, bytes);
  gemm(plain(space.data(), wide), rows, wide, plain(w.down, s.hidden), s.hidden, y, s.hidden, true);
}

struct LayerGradients {
  float *norm1, *q, *k, *v, *output, *norm2, *gate, *up, *down, *q_bias, *k_bias, *v_bias;
};

inline void layer_backward(const Layer& w, const Shape& s, const float* x, const Angles& angles, const int64_t* positions,
                           const int64_t* starts, int64_t sequences, int64_t rows, const Saved& saved, const float* dy,
                           const LayerGradients& g, float* dx) {
  const int64_t dq = s.query_width(), dk = s.key_width(), wide = s.intermediate, h = s.hidden;
  const int64_t widest = wide > dq + 2 * dk ? wide : dq + 2 * dk;
  Buffer first(rows * wide), second(rows * widest), third(rows * (wide > dq ? wide : dq)), normed(rows * h), dnormed(rows * h);

  // down, activation, gate and up
  gemm(plain(dy, h), rows, h, transposed(w.down, h), wide, first.data(), wide);
  float *acted = normed.reserve(rows * (wide > h ? wide : h)), *dgates = second.data(), *dups = third.data();
  gate_backward(s.activation, saved.gates, saved.ups, first.data(), dgates, dups, acted, rows * wide);
  if (s.rounded) round_all(acted, rows * wide);
  gemm(transposed(acted, wide), wide, rows, plain(dy, h), h, g.down, h);
  parallel_rows(rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      scale_row(saved.middle + r * h, saved.scale2[r], w.norm2, s.norm_offset, normed.data() + r * h, h);
  });
  if (s.rounded) round_all(normed.data(), rows * h);
  const Product up_weights[2] = {{plain(dgates, wide), wide, g.gate, wide}, {plain(dups, wide), wide, g.up, wide}};
  gemm(transposed(normed.data(), h), h, rows, up_weights, 2);
  gemm(plain(dgates, wide), rows, wide, transposed(w.gate, wide), h, dnormed.data(), h);
  gemm(plain(dups, wide), rows, wide, transposed(w.up, wide), h, dnormed.data(), h, true);
  std::memcpy(dx, dy, rows * h * sizeof(float));
  rms_norm_backward(saved.middle, saved.scale2, w.norm2, s.norm_offset, dnormed.data(), dx, g.norm2, rows, h, true);

  // output, attention, rotary positions, q/k/v; dx is the gradient of the residual between the halves by now
  float *dmixed = third.data(), *grad_q = second.data(), *grad_k = grad_q + rows * dq, *grad_v = grad_k + rows * dk;
  gemm(plain(dx, h), rows, h, transposed(w.output, h), dq, dmixed, dq);
  gemm(transposed(saved.mixed, dq), dq, rows, plain(dx, h), h, g.output, h);
  attend_backward(saved.q, saved.k, saved.v, saved.mixed, saved.log_norm, dmixed, grad_q, grad_k, grad_v, starts, sequences,
                  s.heads);
  const int64_t half = s.heads.dim / 2;
  parallel_rows(rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float *c = angles.cosine + positions[r] * half, *si = angles.sine + positions[r] * half;
      rotate(grad_q + r * dq, c, si, s.heads.query, s.heads.dim, -1.f);
      rotate(grad_k + r * dk, c, si, s.heads.key, s.heads.dim, -1.f);
      scale_row(x + r * h, saved.scale1[r], w.norm1, s.norm_offset, normed.data() + r * h, h);
    }
  });
  if (s.rounded) round_all(normed.data(), rows * h);
  if (g.q_bias) {
    column_sums(grad_q, rows, dq, g.q_bias);
    column_sums(grad_k, rows, dk, g.k_bias);
    column_sums(grad_v, rows, dk, g.v_bias);
  }
  const Product weights[3] = {
      {plain(grad_q, dq), dq, g.q, dq}, {plain(grad_k, dk), dk, g.k, dk}, {plain(grad_v, dk), dk, g.v, dk}};
  gemm(transposed(normed.data(), h), h, rows, weights, 3);
  gemm(plain(grad_q, dq), rows, dq, transposed(w.q, dq), h, dnormed.data(), h);
  gemm(plain(grad_k, dk), rows, dk, transposed(w.k, dk), h, dnormed.data(), h, true);
  gemm(plain(grad_v, dk), rows, dk, transposed(w.v, dk), h, dnormed.data(), h, true);
  rms_norm_backward(x, saved.scale1, w.norm1, s.norm_offset, dnormed.data(), dx, g.norm1, rows, h, true);
}

}  // namespace alignment
