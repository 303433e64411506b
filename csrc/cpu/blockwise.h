// What the blockwise operations share: a loop over blocks, a block's absmax, and the nearest level.
// The rule is that of qlora_ref/reference/blockwise.py, in the same float operations.

#pragma once

#include <algorithm>
#include <limits>

#include "float_formats.h"

namespace qlora {

// Values that are worked on at a time: a buffer of them stays in the first-level cache, and a
// constant trip count spares the loops their remainders.
constexpr int kChunk = 64;

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

// The largest magnitude. Without their sign, floats are ordered as their bits are, and NaN lies
// above infinity: an integer maximum finds it, lets NaN through, and vectorises.
template <typename Value>
float largest_magnitude(const Value* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<int32_t>(bits_of(to_float(x[i])) & ~kSignBit));
  }
  return float_of(static_cast<uint32_t>(largest));
}

// normalised[i] = x[i] / absmax: by the reciprocal, or by a quotient where that overflows, so that
// tiny blocks keep their shape. A block of zeros stays zero.
template <typename Value>
void normalise(const Value* x, int count, float absmax, float* normalised) {
  const float reciprocal = 1.0f / absmax;
  if (!std::isinf(reciprocal)) {
    for (int i = 0; i < count; ++i) normalised[i] = to_float(x[i]) * reciprocal;
  } else if (absmax == 0.0f) {
    std::fill(normalised, normalised + count, 0.0f);
  } else {
    for (int i = 0; i < count; ++i) normalised[i] = to_float(x[i]) / absmax;
  }
}

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

// positions[i] = the number of the 255 thresholds below values[i]: a binary search in 8 halvings,
// all values a halving at a time. The product instead of a choice keeps compilers from branching,
// which mispredicts every second time.
inline void count_below(const Decisions<256>& decisions, const float* values, int count,
                        int32_t* positions) {
  std::fill(positions, positions + count, 0);
  for (int half = 128; half > 0; half /= 2) {
    for (int i = 0; i < count; ++i) {
      positions[i] += half * (values[i] > decisions.thresholds[positions[i] + half - 1]);
    }
  }
}

// Quantises a block to 8-bit codes and returns its absmax.
template <typename Value>
float quantize_block_8bit(const Value* x, int64_t count, const Decisions<256>& decisions,
                          uint8_t* codes) {
  const float absmax = largest_magnitude(x, count);
  float normalised[kChunk];
  int32_t positions[kChunk];
  for (int64_t start = 0; start < count; start += kChunk) {
    const int size = static_cast<int>(std::min<int64_t>(kChunk, count - start));
    normalise(x + start, size, absmax, normalised);
    count_below(decisions, normalised, size, positions);
    for (int i = 0; i < size; ++i) codes[start + i] = decisions.codes[positions[i]];
  }
  return absmax;
}

// y[i] = codebook[codes[i]] * absmax, rounded once.
template <typename Value>
void dequantize_block_8bit(const uint8_t* codes, int64_t count, float absmax, const float* codebook,
                           Value* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = from_float<Value>(codebook[codes[i]] * absmax);
}

}  // namespace qlora
