// What the blockwise operations share: a loop over blocks, a block's absmax, and the nearest level.
// The rule is that of qlora_ref/reference/blockwise.py, in the same float operations.

#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace qlora {

// Below this number of values, waking other threads costs more than it saves (torch's own limit).
constexpr int64_t kParallelMinimum = 32768;

inline bool is_bad_size(int64_t n, int64_t block_size, int threads) {
  return n < 0 || block_size < 2 || block_size % 2 != 0 || threads < 1;
}

// Calls function(block, start, count) for each block of up to block_size values.
template <typename Function>
void for_each_block(int64_t n, int64_t block_size, [[maybe_unused]] int threads,
                    Function function) {
  const int64_t blocks = n / block_size + (n % block_size != 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (n >= kParallelMinimum)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * block_size;
    function(block, start, std::min(block_size, n - start));
  }
}

// Asks for what the loop over an array will read or write some blocks later, so that memory works
// on while the processor computes. Behind the array's end this reads nothing: it only asks.
//
// The distance, in bytes, is for a loop over one or two arrays. More arrays want a shorter one,
// which leaves them all room in the first-level cache and most of the work to the processor's own
// prefetchers: on Zen 4, four take 1.2 times as long at 2048 as at 384.
template <uintptr_t kDistance = 2048, typename Value>
void read_ahead(const Value* x) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x) + kDistance));
}

// The largest magnitude of all that is added. Without their sign, floats are ordered as their bits
// are, and NaN lies above infinity: an integer maximum finds it and lets NaN through.
class LargestMagnitude {
 public:
  void add(Floats x, All) {
    const Ints magnitude = broadcast(static_cast<int32_t>(~kSignBit));
    largest_ = larger(largest_, bit_and(bits_of(x), magnitude));
  }
  void add(Floats x, First part) {
    float lanes[kLanes];
    store(lanes, x);
    add(load_first(lanes, part.count), All{});
  }

  float get() const { return float_of(static_cast<uint32_t>(largest(largest_))); }

 private:
  Ints largest_ = broadcast(0);
};

template <typename Value>
float largest_magnitude(const Value* x, int64_t count) {
  LargestMagnitude largest;
  for_each_vector(count, [&](int64_t i, auto part) { largest.add(load(x + i, part), All{}); });
  return largest.get();
}

// x / absmax: by the reciprocal, or by a quotient where that overflows, so that tiny blocks keep
// their shape. A block of zeros stays zero.
class Normaliser {
 public:
  explicit Normaliser(float absmax) {
    const float reciprocal = 1.0f / absmax;
    divides_ = std::isinf(reciprocal) && absmax != 0.0f;
    scale_ = broadcast(divides_ ? absmax : absmax == 0.0f ? 0.0f : reciprocal);
  }

  Floats operator()(Floats x) const { return divides_ ? x / scale_ : x * scale_; }

 private:
  bool divides_;
  Floats scale_;
};

// Where the nearest level changes (codebooks.decision_thresholds): a value has the code
// `codes[number of thresholds < value]`. NaN is above no threshold.
template <int kLevels>
struct Decisions {
  float thresholds[kLevels - 1];  // midpoints of the distinct levels, then infinities
  uint8_t codes[kLevels];         // by ascending level; the lowest of equals

  explicit Decisions(const float* codebook) {
    float levels[kLevels];
    sort_levels(codebook, levels);
    std::fill(thresholds, thresholds + kLevels - 1, std::numeric_limits<float>::infinity());
    int distinct = 1;
    for (int i = 1; i < kLevels; ++i) {
      if (levels[i] == levels[distinct - 1]) continue;
      thresholds[distinct - 1] = (levels[distinct - 1] + levels[i]) / 2.0f;
      levels[distinct] = levels[i];
      codes[distinct] = codes[i];
      ++distinct;
    }
  }

 private:
  // By insertion: linear for a sorted codebook, and equal levels stay in the order of their codes.
  void sort_levels(const float* codebook, float* levels) {
    for (int code = 0; code < kLevels; ++code) {
      int place = code;
      for (; place > 0 && levels[place - 1] > codebook[code]; --place) {
        levels[place] = levels[place - 1];
        codes[place] = codes[place - 1];
      }
      levels[place] = codebook[code];
      codes[place] = static_cast<uint8_t>(code);
    }
  }
};

}  // namespace qlora
