// Work shared by OpenMP's threads (Paddle's own OpenMP library, so that the two never compete for the cores), and
// memory that each thread keeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>

#include "paddle/common/exception.h"  // the only one that Paddle hands on; it ends the process on others

// Of omp.h, which clang has only where its own OpenMP library is installed; Paddle's serves all compilers.
extern "C" int omp_get_max_threads();
extern "C" int omp_in_parallel();

namespace alignment {

// f(i) for each i below n, in any order, by any thread: what f(i) computes must not depend on either.
template <class F>
void parallel_for(int64_t n, const F& f) {
  if (n <= 1 || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  // no `omp for`: the loops of newer compilers go wrong in the OpenMP library that Paddle 3.3 ships
  std::atomic<int64_t> next{0};
  // an exception (no memory) must not leave the threads, which would end the process
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr problem;
#pragma omp parallel
  try {
    for (int64_t i = next++; i < n; i = next++) f(i);
  } catch (...) {
    if (!failed.test_and_set()) problem = std::current_exception();
    next = n;
  }
  if (problem) std::rethrow_exception(problem);
}

// f(begin, end) for pieces of at least `least` rows.
template <class F>
void parallel_rows(int64_t rows, int64_t least, const F& f) {
  int64_t pieces = rows / (least > 0 ? least : 1);
  int64_t threads = omp_get_max_threads();
  if (pieces > 4 * threads) pieces = 4 * threads;
  if (pieces < 1) pieces = 1;
  parallel_for(pieces, [&](int64_t i) { f(rows * i / pieces, rows * (i + 1) / pieces); });
}

// A block of floats, aligned to cache lines, that grows and is freed with its owner.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) { reserve(floats); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* reserve(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) {
        size_ = 0;
        PD_THROW("CPU kernels: no memory for ", floats * sizeof(float), " bytes");
      }
    }
    return data_;
  }
  float* data() { return data_; }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace alignment
