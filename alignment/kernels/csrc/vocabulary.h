// The LM head: log-probabilities of chosen tokens without the logits ever being whole in memory, and the choice of the
// next token from them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "gemm.h"
#include "pointwise.h"

namespace alignment {

constexpr int64_t kVocabularyBlock = 1024;  // columns of logits that exist at a time
constexpr int64_t kTokenBlock = 2048;       // rows of logits that exist at a time

// The head's weight, [hidden, vocabulary], or [vocabulary, hidden] when it is the embedding.
struct Head {
  const float* weight;
  int64_t hidden, vocabulary;
  bool tied;
  // columns [from, ...) as the right side of hidden x weight, and of its transpose
  View forward(int64_t from) const { return tied ? transposed(weight + from * hidden, hidden) : plain(weight + from, vocabulary); }
  View backward(int64_t from) const { return tied ? plain(weight + from * hidden, hidden) : transposed(weight + from, vocabulary); }
};

// Which tokens each row's softmax is over: of row r the rising ids[starts[r]] ... ids[starts[r + 1] - 1]; no ids: all.
struct Sets {
  const int64_t *ids = nullptr, *starts = nullptr;
  // those of [from, end)
  std::pair<const int64_t*, const int64_t*> between(int64_t row, int64_t from, int64_t end) const {
    const int64_t *first = ids + starts[row], *last = ids + starts[row + 1];
    first = std::lower_bound(first, last, from);
    return {first, std::lower_bound(first, last, end)};
  }
  bool has(int64_t row, int64_t id) const {
    return !ids || std::binary_search(ids + starts[row], ids + starts[row + 1], id);
  }
};

constexpr float kForbidden = -1e30f;  // in place of minus infinity, as in losses/logprobs.py

// logprob, entropy (null: not wanted), log_norm and greedy [rows] of labels [rows] under softmax(x W / temperature), over
// each row's set; a label outside has a log-prob of about kForbidden.
// The running maximum and sum over blocks of the vocabulary as in Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax".
inline void label_logprobs(const float* x, const Head& head, const int64_t* labels, float temperature, int64_t rows,
                           const Sets& sets, float* logprob, float* entropy, float* log_norm, float* greedy) {
  const float inverse = 1.0f / temperature;
  Buffer space(std::min(rows, kTokenBlock) * kVocabularyBlock);
  struct Running {
    float peak;
    double total, weighted;  // sums of exp(z - peak) and of it times (z - peak)
    float chosen;
  };
  std::vector<Running> running(rows, Running{-INFINITY, 0., 0., 0.f});
  for (int64_t r0 = 0; r0 < rows; r0 += kTokenBlock) {
    const int64_t count = std::min(rows - r0, kTokenBlock);
    for (int64_t v0 = 0; v0 < head.vocabulary; v0 += kVocabularyBlock) {
      const int64_t width = std::min(head.vocabulary - v0, kVocabularyBlock);
      float* z = space.data();
      gemm(plain(x + r0 * head.hidden, head.hidden), count, head.hidden, head.forward(v0), width, z, width);
      parallel_rows(count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          Running& run = running[r0 + i];
          float* row = z + i * width;
          const int64_t label = labels[r0 + i] - v0;
          if (label >= 0 && label < width) run.chosen = sets.has(r0 + i, labels[r0 + i]) ? row[label] : kForbidden;
          int64_t columns = width;
          if (sets.ids) {  // the set's columns move to the front
            const auto [first, last] = sets.between(r0 + i, v0, v0 + width);
            columns = last - first;
            for (int64_t k = 0; k < columns; k++) row[k] = row[first[k] - v0];
            if (columns == 0) continue;
          }
          Vec best = splat(-INFINITY);
          float peak = -INFINITY;
          over_columns(columns, [&](int64_t j, int64_t n) {
            if (n == kLanes) best = larger(best, load(row + j));
            else for (int64_t e = 0; e < n; e++) peak = std::max(peak, row[j + e]);
          });
          peak = std::max(peak, largest(best));
          const float high = std::max(run.peak, peak);
          Vec total{}, weighted{};
          const Vec from = splat(high);
          over_columns(columns, [&](int64_t j, int64_t n) {
            Vec shifted = (get(row + j, n) - from) * inverse;
            Vec e = exp(shifted);
            if (n < kLanes) {
              Vec cut{};
              std::memcpy(&cut, &e, n * sizeof(float));
              e = cut;
            }
            total += e;
            weighted += e * shifted;
          });
          if (run.total > 0) {
            const double moved = static_cast<double>(run.peak - high) * inverse, factor = std::exp(moved);
            run.weighted = factor * (run.weighted + moved * run.total);
            run.total *= factor;
          }
          run.peak = high;
          run.total += sum(total);
          run.weighted += sum(weighted);
        }
      });
    }
  }
  parallel_rows(rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const Running& run = running[r];
      const double log_total = std::log(run.total);
      logprob[r] = static_cast<float>((static_cast<double>(run.chosen) - run.peak) * inverse - log_total);
      log_norm[r] = static_cast<float>(static_cast<double>(run.peak) * inverse + log_total);
      greedy[r] = run.chosen >= run.peak ? 1.f : 0.f;
      // H = log Z - sum p z, with z from the peak
      if (entropy) entropy[r] = static_cast<float>(log_total - run.weighted / run.total);
    }
  });
}

// dx [rows, hidden] and dweight (shaped as the weight; null: not wanted) from the gradients of logprob and entropy (null: none).
// The logits are made anew block by block.
inline void label_logprobs_backward(const float* x, const Head& head, const int64_t* labels, float temperature,
                                    int64_t rows, const Sets& sets, const float* log_norm, const float* entropy,
                                    const float* dlogprob, const float* dentropy, float* dx, float* dweight) {
  const float inverse = 1.0f / temperature;
  Buffer space(std::min(rows, kTokenBlock) * kVocabularyBlock);
  const int64_t h = head.hidden;
  std::memset(dx, 0, rows * h * sizeof(float));
  if (rows == 0 && dweight) std::memset(dweight, 0, head.vocabulary * h * sizeof(float));
  for (int64_t r0 = 0; r0 < rows; r0 += kTokenBlock) {
    const int64_t count = std::min(rows - r0, kTokenBlock);
    const float* xs = x + r0 * h;
    for (int64_t v0 = 0; v0 < head.vocabulary; v0 += kVocabularyBlock) {
      const int64_t width = std::min(head.vocabulary - v0, kVocabularyBlock);
      float* z = space.data();
      gemm(plain(xs, h), count, h, head.forward(v0), width, z, width);
      parallel_rows(count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t r = r0 + i;
          float* row = z + i * width;
          const Vec norm = splat(log_norm[r]), slope = splat(dlogprob[r] * inverse);
          // d logp(label) / d z = onehot - p;  d H / d z = -p (log p + H)
          if (dentropy) {
            const Vec rise = splat(dentropy[r] * inverse), spread = splat(entropy[r]);
            over_columns(width, [&](int64_t j, int64_t n) {
              const Vec logp = get(row + j, n) * inverse - norm, p = exp(logp);
              put(row + j, -p * (slope + rise * (logp + spread)), n);
            });
          } else {
            over_columns(width, [&](int64_t j, int64_t n) { put(row + j, -slope * exp(get(row + j, n) * inverse - norm), n); });
          }
          if (sets.ids) {
            const auto [first, last] = sets.between(r, v0, v0 + width);
            int64_t from = 0;
            for (const int64_t* id = first; id != last; from = *id++ - v0 + 1) std::fill(row + from, row + (*id - v0), 0.f);
            std::fill(row + from, row + width, 0.f);
          }
          const int64_t label = labels[r] - v0;
          if (label >= 0 && label < width && sets.has(r, labels[r])) row[label] += slope[0];
        }
      });
      gemm(plain(z, width), count, width, head.backward(v0), h, dx + r0 * h, h, true);
      if (!dweight) continue;
      if (head.tied)
        gemm(transposed(z, width), width, count, plain(xs, h), h, dweight + v0 * h, h, r0 > 0);
      else
        gemm(transposed(xs, h), h, count, plain(z, width), width, dweight + v0, head.vocabulary, r0 > 0);
    }
  }
}

struct Sampling {
  float temperature;
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  float penalty;       // 1: none
  bool greedy;
};

// Zeroes all but the smallest set of largest weights that together reach top_p of their sum; of equal weights the first
// ones stay. The weights' leading bits give buckets in order of size, so only the bucket at the border is sorted.
inline void keep_nucleus(float* weights, int64_t count, double top_p) {
  constexpr int kShift = 19;  // exponent and four bits of the fraction
  static thread_local std::vector<double> sums(1 << (32 - kShift - 1));
  std::fill(sums.begin(), sums.end(), 0.);
  auto bucket = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> kShift;
  };
  double total = 0;
  for (int64_t j = 0; j < count; j++) {
    sums[bucket(weights[j])] += weights[j];
    total += weights[j];
  }
  double needed = (top_p - 1e-12) * total;
  int64_t border = static_cast<int64_t>(sums.size()) - 1;
  while (border > 0 && sums[border] < needed) needed -= sums[border--];
  std::vector<float> close;
  for (int64_t j = 0; j < count; j++)
    if (bucket(weights[j]) == border) close.push_back(weights[j]);
  std::sort(close.begin(), close.end(), std::greater<float>());
  size_t kept = 0;
  while (kept < close.size() && needed > 0) needed -= close[kept++];
  if (kept == 0) kept = close.empty() ? 0 : 1;
  const float least = kept ? close[kept - 1] : 0.f;
  int64_t equal = std::count(close.begin(), close.begin() + kept, least);
  for (int64_t j = 0; j < count; j++) {
    if (weights[j] > least || (weights[j] == least && equal-- > 0)) continue;
    weights[j] = 0.f;
  }
}

// One token for a row of logits. `seen` [vocabulary] bytes or null; `banned` ids have no chance, and no others than
// `allowed` [vocabulary] bytes or null. Returns the token, -1 when a logit is NaN or infinite or no token has a chance.
// `logprob` is of softmax(logits / temperature) before any filter,
// `sampler_logprob` of the distribution that was drawn from: the same number where nothing changed it.
inline int64_t choose_token(const float* logits, int64_t vocabulary, const Sampling& how, double uniform,
                            const uint8_t* seen, const uint8_t* allowed, const int64_t* banned, int64_t ban_count,
                            float* space, float* logprob, float* sampler_logprob) {
  constexpr int64_t kBlock = 256;  // sums of blocks are exact enough in float, the running sum is a double
  const float inverse = 1.0f / how.temperature;
  auto peak_of = [&](const float* z) {
    float best = -INFINITY;
    for (int64_t j = 0; j < vocabulary; j++) best = z[j] > best ? z[j] : best;
    return best;
  };
  Vec check{};
  over_columns(vocabulary, [&](int64_t j, int64_t n) { check += get(logits + j, n) * 0.0f; });
  if (!(sum(check) == 0.0f)) return -1;
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  auto weigh = [&](const float* z, float peak) {  // space = exp((z - peak) / temperature), block by block
    double total = 0;
    const Vec from = splat(peak);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = b * kBlock, width = std::min(kBlock, vocabulary - first);
      Vec part{};
      over_columns(width, [&](int64_t j, int64_t n) {
        put(space + first + j, exp((get(z + first + j, n) - from) * inverse), n);
        part += get(space + first + j, n);
      });
      total += sums[b] = sum(part);
    }
    return total;
  };
  const float peak = peak_of(logits);
  double total = weigh(logits, peak);
  const double log_total = std::log(total);
  const bool changed = seen != nullptr || allowed != nullptr || ban_count > 0;
  const float* z = logits;
  float z_peak = peak;
  float* adjusted = space + vocabulary;
  if (changed) {
    std::memcpy(adjusted, logits, vocabulary * sizeof(float));
    if (seen)
      for (int64_t j = 0; j < vocabulary; j++)
        if (seen[j]) adjusted[j] = adjusted[j] > 0 ? adjusted[j] / how.penalty : adjusted[j] * how.penalty;
    for (int64_t i = 0; i < ban_count; i++) adjusted[banned[i]] = -INFINITY;
    if (allowed)
      for (int64_t j = 0; j < vocabulary; j++)
        if (!allowed[j]) adjusted[j] = -INFINITY;
    z = adjusted;
    z_peak = peak_of(z);
    if (z_peak == -INFINITY) return -1;
  }
  int64_t token = 0;
  bool filtered = false;
  if (how.greedy) {
    token = std::max_element(z, z + vocabulary) - z;
  } else {
    if (changed) total = weigh(z, z_peak);
    if (how.top_k > 0 && how.top_k < vocabulary) {
      std::vector<float> order(space, space + vocabulary);
      std::nth_element(order.begin(), order.begin() + (how.top_k - 1), order.end(), std::greater<float>());
      const float least = order[how.top_k - 1];
      for (int64_t j = 0; j < vocabulary; j++)
        if (space[j] < least) space[j] = 0.f;
      filtered = true;
    }
    if (how.top_p < 1.0) {
      keep_nucleus(space, vocabulary, how.top_p);
      filtered = true;
    }
    if (filtered) {
      total = 0;
      for (int64_t b = 0; b < blocks; b++) {
        double part = 0;
        for (int64_t j = b * kBlock; j < std::min((b + 1) * kBlock, vocabulary); j++) part += space[j];
        total += sums[b] = part;
      }
    }
    // the inverse of the distribution function at `uniform`
    const double target = uniform * total;
    double before = 0;
    int64_t b = 0;
    while (b + 1 < blocks && before + sums[b] <= target) before += sums[b++];
    token = -1;
    int64_t last = -1;  // rounding must not step over the last token that has a chance
    for (; b < blocks && token < 0; b++)
      for (int64_t j = b * kBlock; j < std::min((b + 1) * kBlock, vocabulary); j++) {
        before += space[j];
        if (space[j] > 0.f) last = j;
        if (before > target && space[j] > 0.f) {
          token = j;
          break;
        }
      }
    if (token < 0) token = last;
    for (int64_t j = vocabulary - 1; token < 0 && j >= 0; j--)
      if (space[j] > 0.f) token = j;
  }
  *logprob = static_cast<float>((static_cast<double>(logits[token]) - peak) * inverse - log_total);
  *sampler_logprob = *logprob;
  if (how.greedy)
    *sampler_logprob = 0.f;
  else if (changed || filtered)
    *sampler_logprob = static_cast<float>((static_cast<double>(z[token]) - z_peak) * inverse - std::log(total));
  return token;
}

}  // namespace alignment
