// What quantising to 4 and to 8 bits shares: x / absmax, and the nearest level of any codebook.
// The rule is that of qlora_ref/reference/blockwise.py, in the same float operations.

#pragma once

#include "grid.cuh"
#include "memory.cuh"

namespace qlora {

// x / absmax: by the reciprocal, or by a quotient where that overflows, so that tiny blocks keep
// their shape. A block of zeros stays zero.
__device__ inline float normalise(float x, float absmax) {
  const float reciprocal = 1.0f / absmax;
  if (!isinf(reciprocal)) return x * reciprocal;
  return absmax == 0.0f ? 0.0f : x / absmax;
}

// The lowest code of the level 0, which fills up the last byte after an odd number of values.
__device__ inline uint32_t code_of_zero(const float* codebook) {
  for (int code = 0; code < 16; ++code) {
    if (codebook[code] == 0.0f) return code;
  }
  return 0;
}

// How many of the numbers from 0 up to kNumber - 2 fulfil a condition that fails for all numbers
// after the first for which it fails. kNumber: a power of two.
template <int kNumber, typename Condition>
__device__ int count(Condition condition) {
  int passed = 0;
#pragma unroll
  for (int step = kNumber / 2; step > 0; step /= 2) {
    if (condition(passed + step - 1)) passed += step;
  }
  return passed;
}

// Where the nearest level changes: a value has the code `codes[number of thresholds < value]`. NaN
// is above no threshold. Lies in shared memory.
//
// Levels are in ascending order, equal ones in the order of their codes. The threshold of each is
// its midpoint to the next larger level, or infinity. So equal levels have equal thresholds, and
// only the first of them is ever reached.
template <int kLevels>
struct Decisions {
  float levels[kLevels];  // in the order of codes
  float thresholds[kLevels];
  uint32_t codes[kLevels];

  // Called by all threads of a thread block; each puts one level in its place.
  __device__ void fill(const float* codebook) {
    static_assert(kLevels <= kThreads, "a thread has one level at most");
    const int code = threadIdx.x;
    if (code < kLevels) levels[code] = codebook[code];
    __syncthreads();
    const bool is_ascending =
        __syncthreads_and(code >= kLevels - 1 || levels[code] < levels[code + 1]);
    if (code < kLevels) place(code, is_ascending);
    __syncthreads();
  }

  __device__ uint32_t code(float value) const {
    return codes[count<kLevels>([=](int i) { return value > thresholds[i]; })];
  }

 private:
  __device__ void place(int code, bool is_ascending) {
    const float level = levels[code];
    float next = __int_as_float(0x7f800000);  // infinity
    int position = 0;
    if (is_ascending) {  // most codebooks: spares a comparison with each level
      position = code;
      if (code < kLevels - 1) next = levels[code + 1];
    } else {
      for (int other = 0; other < kLevels; ++other) {
        const float candidate = levels[other];
        position += candidate < level || (candidate == level && other < code);
        if (candidate > level) next = fminf(next, candidate);
      }
    }
    // A midpoint may round to -0, which look-ups would take for less than 0.
    thresholds[position] = (level + next) / 2.0f + 0.0f;
    codes[position] = code;
  }
};

}  // namespace qlora
