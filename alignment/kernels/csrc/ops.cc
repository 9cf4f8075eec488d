// The kernels as Paddle operators, which alignment/kernels/ops.py documents. Every tensor is float32 on the CPU but for
// the int64 plans (data<T>() refuses others), and contiguous (Paddle sees to it); all else is checked here.
#include "checks.h"
#include "layer.h"
#include "optimizer.h"
#include "paddle/extension.h"
#include "vocabulary.h"

namespace {

using alignment::Head;
using alignment::Layer;
using alignment::LayerGradients;
using alignment::Saved;
using alignment::Shape;
using alignment::Span;
using paddle::Tensor;
using Tensors = std::vector<Tensor>;
using Dims = std::vector<int64_t>;

constexpr int kLayerWeights = 9;  // norm1, q, k, v, output, norm2, gate, up, down; then three biases, if any
constexpr int kLayerBiases = 3;

const float* floats(const Tensor& t) { return t.data<float>(); }
float* written(const Tensor& t) { return const_cast<float*>(t.data<float>()); }
Tensor made(const Dims& dims) { return paddle::empty(dims, paddle::DataType::FLOAT32, paddle::CPUPlace()); }

// shape: hidden, intermediate, query heads, key heads, dim, window, activation, biases, rounded
Shape shape_of(const Dims& shape, float epsilon, float norm_offset) {
  alignment::need_shape(shape);
  Shape s;
  s.hidden = shape[0];
  s.intermediate = shape[1];
  s.heads = {shape[2], shape[3], shape[4], 1.0f / std::sqrt(static_cast<float>(shape[4])), shape[5]};
  s.activation = static_cast<alignment::Activation>(shape[6]);
  s.epsilon = epsilon;
  s.norm_offset = norm_offset;
  s.rounded = shape[8] != 0;
  return s;
}

Layer layer_of(const Tensors& weights, size_t at, bool biases) {
  const float* p[kLayerWeights + kLayerBiases] = {};
  for (int i = 0; i < kLayerWeights + (biases ? kLayerBiases : 0); i++) p[i] = floats(weights[at + i]);
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11]};
}

enum Part { kWhole = 0, kAttention = 1, kMlp = 2 };

// plan: packed [positions T | places T | starts S + 1], cached [positions T | places T | spans 4 T].
Tensors Stack(const Tensor& x, const Tensors& weights, const Tensor& cosine, const Tensor& sine, const Tensor& cache,
              const Tensor& plan, const Dims& shape, float epsilon, float norm_offset, int64_t sequences, bool cached,
              int64_t part, int64_t first_layer) {
  const Shape s = shape_of(shape, epsilon, norm_offset);
  const bool biases = shape[7] != 0;
  const int64_t h = s.hidden, each = kLayerWeights + (biases ? kLayerBiases : 0);
  const int64_t layers = alignment::need_layers(weights, s, biases, "stack"), rows = alignment::need_rows(x, h, "x");
  ALIGNMENT_NEED(part == kWhole || (layers == 1 && (part == kAttention || part == kMlp)), "there is no part ", part,
                 " of ", layers, " layers");
  ALIGNMENT_NEED(cached || sequences >= 0, "there are ", sequences, " sequences");
  alignment::need_size(plan, cached ? 6 * rows : 2 * rows + sequences + 1, "the plan");
  const int64_t* numbers = plan.data<int64_t>();
  const int64_t *places = numbers + rows, *more = places + rows;
  const alignment::Angles angles{floats(cosine), floats(sine)};
  const int64_t half = cache.numel() ? cache.numel() / cache.shape()[0] / 2 : 0, tokens = half / s.key_width();
  if (part != kMlp) {
    alignment::need_angles(cosine, sine, s, numbers, rows);
    ALIGNMENT_NEED(half % (s.key_width() * alignment::kCacheBlock) == 0, "the cache is no whole blocks of tokens");
    ALIGNMENT_NEED(!half || (first_layer >= 0 && first_layer + layers <= cache.shape()[0]), "layers ", first_layer,
                   " to ", first_layer + layers, " have no place in a cache of ", cache.shape()[0]);
    alignment::need_below(places, rows, cached ? 0 : -1, half ? tokens : 0, "place");
    if (cached) alignment::need_spans(reinterpret_cast<const Span*>(more), 2 * rows, tokens);
  }
  if (!cached) alignment::need_starts(more, sequences, rows);
  Tensor y = made({rows, h});
  float* out = written(y);
  // Packed sequences go through all layers in groups of about this many tokens, which stay near the cores.
  constexpr int64_t kGroup = 1024;
  static thread_local alignment::Buffer space;
  for (int64_t begin = 0, s0 = 0; begin < rows;) {
    int64_t end = rows, s1 = sequences;
    std::vector<int64_t> starts;
    if (!cached) {
      s1 = s0 + 1;
      while (s1 < sequences && more[s1 + 1] - more[s0] <= kGroup) s1++;
      end = more[s1];
      for (int64_t i = s0; i <= s1; i++) starts.push_back(more[i] - more[s0]);
    }
    const int64_t count = end - begin;
    float* room = space.reserve(alignment::part_space(s, count));
    const alignment::Context context{numbers + begin, places + begin, starts.data(), s1 - s0,
                                     cached ? reinterpret_cast<const Span*>(more) : nullptr};
    float *from = const_cast<float*>(floats(x)) + begin * h, *to = out + begin * h;
    if (part == kWhole) std::memcpy(to, from, count * h * sizeof(float));
    for (int64_t i = 0; i < layers; i++) {
      const Layer layer = layer_of(weights, i * each, biases);
      alignment::Cache mine{};
      if (half) {
        mine.keys = written(cache) + (first_layer + i) * 2 * half;
        mine.values = mine.keys + half;
        mine.tokens = tokens;
      }
      const bool whole = part == kWhole;
      if (part != kMlp)
        alignment::attention_part(layer, s, whole ? to : from, angles, context, half ? &mine : nullptr, count, room, to, whole);
      if (part != kAttention) alignment::mlp_part(layer, s, whole ? to : from, count, room, to, whole);
    }
    begin = end;
    s0 = s1;
  }
  return {y};
}

Tensors Embed(const Tensor& ids, const Tensor& weight, float scale) {
  ALIGNMENT_NEED(weight.shape().size() == 2, "an embedding is [ids, width]");
  const int64_t rows = ids.numel(), width = weight.shape()[1];
  const int64_t* at = ids.data<int64_t>();
  alignment::need_below(at, rows, 0, weight.shape()[0], "id");
  const float* table = floats(weight);
  Tensor y = made({rows, width});
  float* out = written(y);
  alignment::parallel_rows(rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      alignment::over_columns(width, [&](int64_t i, int64_t n) {
        alignment::put(out + r * width + i, alignment::get(table + at[r] * width + i, n) * scale, n);
      });
  });
  return {y};
}

Tensors RmsNorm(const Tensor& x, const Tensor& weight, float epsilon, float norm_offset) {
  const int64_t width = weight.numel();
  ALIGNMENT_NEED(!x.shape().empty() && x.shape().back() == width, "rows of ", x.shape().empty() ? 0 : x.shape().back(),
                 " numbers and a norm of ", width);
  Tensor y = made(x.shape());
  alignment::rms_norm(floats(x), floats(weight), norm_offset, epsilon, written(y), nullptr, x.numel() / width, width);
  return {y};
}

// Checks what a layer over packed sequences is given; returns the number of tokens.
int64_t need_layer(const Tensor& x, const Tensors& weights, const Tensor& cosine, const Tensor& sine, const Tensor& plan,
                   const Shape& s, bool biases, int64_t sequences) {
  const int64_t t = alignment::need_rows(x, s.hidden, "x");
  const int64_t layers = alignment::need_layers(weights, s, biases, "layer");
  ALIGNMENT_NEED(layers == 1 && sequences >= 0, layers, " layers and ", sequences, " sequences");
  alignment::need_size(plan, t + sequences + 1, "the plan");
  const int64_t* numbers = plan.data<int64_t>();
  alignment::need_angles(cosine, sine, s, numbers, t);
  alignment::need_starts(numbers + t, sequences, t);
  return t;
}

Tensors LayerForward(const Tensor& x, const Tensors& weights, const Tensor& cosine, const Tensor& sine, const Tensor& plan,
                     const Dims& shape, float epsilon, float norm_offset, int64_t sequences) {
  const Shape s = shape_of(shape, epsilon, norm_offset);
  const int64_t t = need_layer(x, weights, cosine, sine, plan, s, shape[7] != 0, sequences);
  Tensors outs = {made({t, s.hidden}), made({t}), made({t, s.query_width()}), made({t, s.key_width()}),
                  made({t, s.key_width()}), made({t, s.heads.query}), made({t, s.query_width()}), made({t, s.hidden}),
                  made({t}), made({t, s.intermediate}), made({t, s.intermediate})};
  float* p[11];
  for (int i = 0; i < 11; i++) p[i] = written(outs[i]);
  const int64_t* numbers = plan.data<int64_t>();
  alignment::layer_forward(layer_of(weights, 0, shape[7] != 0), s, floats(x), {floats(cosine), floats(sine)}, numbers,
                           numbers + t, sequences, t, {p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10]}, p[0]);
  return outs;
}

// Fills `grads`, which are shaped as the weights.
Tensors LayerBackward(const Tensor& x, const Tensors& weights, const Tensor& cosine, const Tensor& sine, const Tensor& plan,
                      const Tensors& saved, const Tensors& grads, const Tensor& dy, const Dims& shape, float epsilon,
                      float norm_offset, int64_t sequences) {
  const Shape s = shape_of(shape, epsilon, norm_offset);
  const bool biases = shape[7] != 0;
  const int64_t t = need_layer(x, weights, cosine, sine, plan, s, biases, sequences);
  alignment::need_layers(grads, s, biases, "gradients");
  ALIGNMENT_NEED(grads.size() == weights.size(), grads.size(), " gradients of ", weights.size(), " weights");
  alignment::need_size(dy, x.numel(), "the output's gradient");
  const int64_t kept[10] = {t, t * s.query_width(), t * s.key_width(), t * s.key_width(), t * s.heads.query,
                            t * s.query_width(), t * s.hidden, t, t * s.intermediate, t * s.intermediate};
  ALIGNMENT_NEED(saved.size() == 10, saved.size(), " tensors were kept; 10 are wanted");
  for (int i = 0; i < 10; i++) alignment::need_size(saved[i], kept[i], "what the forward kept");
  Tensor dx = made(x.shape());
  float* g[kLayerWeights + kLayerBiases] = {};
  for (size_t i = 0; i < grads.size(); i++) g[i] = written(grads[i]);
  float* p[10];
  for (int i = 0; i < 10; i++) p[i] = written(saved[i]);
  const int64_t* numbers = plan.data<int64_t>();
  alignment::layer_backward(layer_of(weights, 0, biases), s, floats(x), {floats(cosine), floats(sine)}, numbers, numbers + t,
                            sequences, t, {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]}, floats(dy),
                            {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11]}, written(dx));
  return {dx};
}

Head head_of(const Tensor& weight, bool tied) {
  const auto dims = weight.shape();
  ALIGNMENT_NEED(dims.size() == 2, "an LM head has two dimensions, not ", dims.size());
  return {floats(weight), dims[tied ? 1 : 0], dims[tied ? 0 : 1], tied};
}

// Checks hidden states and labels against the head; returns the number of tokens.
int64_t need_labels(const Tensor& x, const Head& head, const Tensor& labels) {
  const int64_t n = alignment::need_rows(x, head.hidden, "x");
  alignment::need_size(labels, n, "labels");
  alignment::need_below(labels.data<int64_t>(), n, 0, head.vocabulary, "label");
  return n;
}

using MaybeTensor = paddle::optional<Tensor>;

alignment::Sets need_sets(const MaybeTensor& ids, const MaybeTensor& starts, int64_t rows, int64_t vocabulary) {
  ALIGNMENT_NEED(!ids == !starts, "sets of tokens are ids and starts");
  if (!ids) return {};
  alignment::need_size(*starts, rows + 1, "the starts of the sets");
  const alignment::Sets sets{ids->data<int64_t>(), starts->data<int64_t>()};
  alignment::need_starts(sets.starts, rows, ids->numel());
  alignment::need_below(sets.ids, ids->numel(), 0, vocabulary, "allowed id");
  for (int64_t r = 0; r < rows; r++) {
    ALIGNMENT_NEED(sets.starts[r] < sets.starts[r + 1], "the set of row ", r, " is empty");
    for (int64_t i = sets.starts[r] + 1; i < sets.starts[r + 1]; i++)
      ALIGNMENT_NEED(sets.ids[i - 1] < sets.ids[i], "the ids of row ", r, "'s set do not rise");
  }
  return sets;
}

Tensors LabelLogprobs(const Tensor& x, const Tensor& weight, const Tensor& labels, const MaybeTensor& ids,
                      const MaybeTensor& starts, float temperature, bool tied, bool want_entropy) {
  const Head head = head_of(weight, tied);
  const int64_t n = need_labels(x, head, labels);
  const alignment::Sets sets = need_sets(ids, starts, n, head.vocabulary);
  Tensors outs = {made({n}), made({n}), made({n}), made({n})};
  if (!want_entropy) std::memset(written(outs[1]), 0, n * sizeof(float));
  alignment::label_logprobs(floats(x), head, labels.data<int64_t>(), temperature, n, sets, written(outs[0]),
                            want_entropy ? written(outs[1]) : nullptr, written(outs[2]), written(outs[3]));
  return outs;
}

Tensors LabelLogprobsBackward(const Tensor& x, const Tensor& weight, const Tensor& labels, const Tensor& log_norm,
                              const Tensor& entropy, const Tensor& dlogprob, const Tensor& dentropy,
                              const MaybeTensor& ids, const MaybeTensor& starts, float temperature, bool tied,
                              bool through_entropy, bool of_weight) {
  const Head head = head_of(weight, tied);
  const int64_t n = need_labels(x, head, labels);
  const alignment::Sets sets = need_sets(ids, starts, n, head.vocabulary);
  for (const Tensor* one : {&log_norm, &entropy, &dlogprob, &dentropy}) alignment::need_size(*one, n, "one number a token");
  Tensor dx = made(x.shape()), dweight = made(of_weight ? weight.shape() : Dims{0});
  alignment::label_logprobs_backward(floats(x), head, labels.data<int64_t>(), temperature, n, sets,
                                     floats(log_norm), floats(entropy), floats(dlogprob),
                                     through_entropy ? floats(dentropy) : nullptr, written(dx),
                                     of_weight ? written(dweight) : nullptr);
  return {dx, dweight};
}

Tensors SquareSum(const Tensors& inputs) {
  std::vector<const float*> arrays;
  Dims sizes;
  for (const Tensor& t : inputs) {
    arrays.push_back(floats(t));
    sizes.push_back(t.numel());
  }
  Tensor total = paddle::empty({1}, paddle::DataType::FLOAT64, paddle::CPUPlace());
  *const_cast<double*>(total.data<double>()) = alignment::square_sum(arrays, sizes);
  return {total};
}

// Writes weights, moments and the powers of beta, which become those of the next step. settings: rate, beta1, beta2,
// epsilon, scale.
Tensors AdamW(const Tensors& weights, const Tensors& grads, const Tensors& first, const Tensors& second,
              const Tensors& power1, const Tensors& power2, const std::vector<float>& settings,
              const std::vector<float>& decay) {
  std::vector<alignment::AdamTensor> tensors;
  Dims sizes;
  const size_t count = weights.size();
  for (const Tensors* list : {&grads, &first, &second, &power1, &power2})
    ALIGNMENT_NEED(list->size() == count, "AdamW has ", count, " weights and ", list->size(), " of something else");
  ALIGNMENT_NEED(settings.size() == 5 && decay.size() == count, "AdamW has ", settings.size(), " settings and ",
                 decay.size(), " decays");
  for (size_t i = 0; i < count; i++) {
    for (const Tensor* one : {&grads[i], &first[i], &second[i]})
      ALIGNMENT_NEED(one->numel() == weights[i].numel(), "weight ", i, " has ", weights[i].numel(),
                     " numbers, its gradient or a moment ", one->numel());
    ALIGNMENT_NEED(power1[i].numel() == 1 && power2[i].numel() == 1, "weight ", i, ": a power of beta is one number");
  }
  for (size_t i = 0; i < weights.size(); i++) {
    tensors.push_back({written(weights[i]), written(first[i]), written(second[i]), floats(grads[i]), decay[i],
                       *floats(power1[i]), *floats(power2[i])});
    sizes.push_back(weights[i].numel());
  }
  alignment::adamw(tensors, sizes, {settings[0], settings[1], settings[2], settings[3], settings[4]});
  for (size_t i = 0; i < weights.size(); i++) {
    *written(power1[i]) *= settings[1];
    *written(power2[i]) *= settings[2];
  }
  return {made({1})};
}

Tensors Project(const Tensor& x, const Tensor& weight, bool tied) {
  const Head head = head_of(weight, tied);
  const int64_t rows = alignment::need_rows(x, head.hidden, "x");
  Tensor y = made({rows, head.vocabulary});
  alignment::gemm(alignment::plain(floats(x), head.hidden), rows, head.hidden, head.forward(0), head.vocabulary, written(y),
                  head.vocabulary);
  return {y};
}

// logits [B, V]; uniforms [B] float64; seen [B, V] uint8 or empty; banned [B] uint8: whether `banned_ids` have no chance.
Tensors Choose(const Tensor& logits, const Tensor& uniforms, const Tensor& seen, const Tensor& banned,
               const MaybeTensor& allowed, float temperature, int64_t top_k, double top_p, float penalty,
               bool greedy, const Dims& banned_ids) {
  ALIGNMENT_NEED(logits.shape().size() == 2 && logits.shape()[1] > 0, "logits are [rows, vocabulary]");
  const int64_t rows = logits.shape()[0], vocabulary = logits.shape()[1];
  alignment::need_size(uniforms, rows, "uniforms");
  alignment::need_size(banned, rows, "banned");
  if (seen.numel()) alignment::need_size(seen, rows * vocabulary, "seen");
  if (allowed) alignment::need_size(*allowed, rows * vocabulary, "allowed");
  alignment::need_below(banned_ids.data(), static_cast<int64_t>(banned_ids.size()), 0, vocabulary, "banned id");
  Tensor tokens = paddle::empty({rows}, paddle::DataType::INT64, paddle::CPUPlace());
  Tensor logprobs = made({rows}), sampler_logprobs = made({rows});
  const alignment::Sampling how{temperature, top_k, top_p, penalty, greedy};
  const float* z = floats(logits);
  const double* u = uniforms.data<double>();
  const uint8_t* marks = seen.numel() ? seen.data<uint8_t>() : nullptr;
  const uint8_t* open = allowed ? allowed->data<uint8_t>() : nullptr;
  const uint8_t* bans = banned.data<uint8_t>();
  int64_t* chosen = const_cast<int64_t*>(tokens.data<int64_t>());
  float *found = written(logprobs), *drawn = written(sampler_logprobs);
  alignment::parallel_for(rows, [&](int64_t r) {
    static thread_local alignment::Buffer space;
    chosen[r] = alignment::choose_token(z + r * vocabulary, vocabulary, how, u[r], marks ? marks + r * vocabulary : nullptr,
                                        open ? open + r * vocabulary : nullptr, banned_ids.data(), bans[r] ? static_cast<int64_t>(banned_ids.size()) : 0,
                                        space.reserve(2 * vocabulary), found + r, drawn + r);
  });
  return {tokens, logprobs, sampler_logprobs};
}

}  // namespace

PD_BUILD_OP(alignment_stack)
    .Inputs({"X", paddle::Vec("Weights"), "Cosine", "Sine", "Cache", "Plan"})
    .Outputs({"Y"})
    .Attrs({"shape: std::vector<int64_t>", "epsilon: float", "norm_offset: float", "sequences: int64_t", "cached: bool",
            "part: int64_t", "first_layer: int64_t"})
    .SetKernelFn(PD_KERNEL(Stack));

PD_BUILD_OP(alignment_embed)
    .Inputs({"Ids", "Weight"})
    .Outputs({"Y"})
    .Attrs({"scale: float"})
    .SetKernelFn(PD_KERNEL(Embed));

PD_BUILD_OP(alignment_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({"Y"})
    .Attrs({"epsilon: float", "norm_offset: float"})
    .SetKernelFn(PD_KERNEL(RmsNorm));

PD_BUILD_OP(alignment_layer_forward)
    .Inputs({"X", paddle::Vec("Weights"), "Cosine", "Sine", "Plan"})
    .Outputs({"Y", "Scale1", "Q", "K", "V", "LogNorm", "Mixed", "Middle", "Scale2", "Gates", "Ups"})
    .Attrs({"shape: std::vector<int64_t>", "epsilon: float", "norm_offset: float", "sequences: int64_t"})
    .SetKernelFn(PD_KERNEL(LayerForward));

PD_BUILD_OP(alignment_layer_backward)
    .Inputs({"X", paddle::Vec("Weights"), "Cosine", "Sine", "Plan", paddle::Vec("Saved"), paddle::Vec("Grads"), "DY"})
    .Outputs({"DX"})
    .Attrs({"shape: std::vector<int64_t>", "epsilon: float", "norm_offset: float", "sequences: int64_t"})
    .SetKernelFn(PD_KERNEL(LayerBackward));

PD_BUILD_OP(alignment_label_logprobs)
    .Inputs({"X", "Weight", "Labels", paddle::Optional("AllowedIds"), paddle::Optional("AllowedStarts")})
    .Outputs({"Logprobs", "Entropy", "LogNorm", "Greedy"})
    .Attrs({"temperature: float", "tied: bool", "want_entropy: bool"})
    .SetKernelFn(PD_KERNEL(LabelLogprobs));

PD_BUILD_OP(alignment_label_logprobs_backward)
    .Inputs({"X", "Weight", "Labels", "LogNorm", "Entropy", "DLogprobs", "DEntropy", paddle::Optional("AllowedIds"),
             paddle::Optional("AllowedStarts")})
    .Outputs({"DX", "DWeight"})
    .Attrs({"temperature: float", "tied: bool", "through_entropy: bool", "of_weight: bool"})
    .SetKernelFn(PD_KERNEL(LabelLogprobsBackward));

PD_BUILD_OP(alignment_square_sum)
    .Inputs({paddle::Vec("X")})
    .Outputs({"Total"})
    .SetKernelFn(PD_KERNEL(SquareSum));

PD_BUILD_OP(alignment_adamw)
    .Inputs({paddle::Vec("Weights"), paddle::Vec("Grads"), paddle::Vec("First"), paddle::Vec("Second"),
             paddle::Vec("Power1"), paddle::Vec("Power2")})
    .Outputs({"Done"})
    .Attrs({"settings: std::vector<float>", "decay: std::vector<float>"})
    .SetKernelFn(PD_KERNEL(AdamW));

PD_BUILD_OP(alignment_project)
    .Inputs({"X", "Weight"})
    .Outputs({"Y"})
    .Attrs({"tied: bool"})
    .SetKernelFn(PD_KERNEL(Project));

PD_BUILD_OP(alignment_choose)
    .Inputs({"Logits", "Uniforms", "Seen", "Banned", paddle::Optional("Allowed")})
    .Outputs({"Tokens", "Logprobs", "SamplerLogprobs"})
    .Attrs({"temperature: float", "top_k: int64_t", "top_p: double", "penalty: float", "greedy: bool",
            "banned_ids: std::vector<int64_t>"})
    .SetKernelFn(PD_KERNEL(Choose));
