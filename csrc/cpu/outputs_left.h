// How threads take turns at the outputs of a product.

#pragma once

#include <algorithm>
#include <atomic>

#include "scratch.h"

namespace qlora {

// The outputs that no thread has taken yet. Blocks of them become ever smaller, so that all threads
// end at about the same time, whatever holds one of them up.
class alignas(kCacheLine) OutputsLeft {
 public:
  // A block is one of `parts` of what is left, in whole units: at least two, at most `largest`.
  OutputsLeft(int64_t outputs, int64_t unit, int64_t largest, int parts)
      : outputs_(outputs), unit_(unit), largest_(largest), parts_(parts) {}

  // Takes the block that begins at *first, and returns its length: 0 if none is left.
  int64_t take(int64_t* first) {
    *first = next_.load(std::memory_order_relaxed);
    int64_t count;
    do {
      const int64_t left = outputs_ - *first;
      const int64_t part = std::max(left / parts_, 2 * unit_);
      count = std::min({left, round_up(part, unit_), largest_});
    } while (!next_.compare_exchange_weak(*first, *first + count, std::memory_order_relaxed));
    return count;
  }

 private:
  int64_t outputs_, unit_, largest_;
  int parts_;
  std::atomic<int64_t> next_{0};
};

}  // namespace qlora
