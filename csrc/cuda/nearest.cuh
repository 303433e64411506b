// The nearest level by one look-up and one comparison.
//
// Normalised values, from -1 to 1, are cut into buckets so narrow that no more than one threshold
// lies in each. A bucket's entry has that threshold, and the codes below and above it.

#pragma once

#include "blockwise.cuh"

namespace qlora {

// The buckets for kLevels levels. `of` never falls as the value rises, and it is used for values
// and for thresholds alike: that is all that a table needs to be right. `of` lies from 0 to
// kNumber - 1 for values; `of_any` may lie outside for thresholds that no value reaches.
template <int kLevels>
struct Buckets;

// Of equal width.
template <>
struct Buckets<16> {
  static constexpr int kNumber = 512;

  // 2^23 + 2^22 + 256 as a float: at this size the last bit of a float counts ones, so that adding
  // rounds to a whole number and leaves it, plus 256, in the lower bits.
  static constexpr float kRounder = 12583168.0f;
  static constexpr uint32_t kRounderBits = 0x4b400000;

  __device__ static uint32_t of(float value) {
    return __float_as_uint(__fmaf_rn(value, 255.0f, kRounder)) % kNumber;
  }

  __device__ static int of_any(float value) {
    const float near = fminf(fmaxf(value, -2.0f), 2.0f);
    return __float_as_uint(__fmaf_rn(near, 255.0f, kRounder)) - kRounderBits;
  }
};

// By the upper bits of a float: 64 buckets for each power of two from 2^-31 to 2, as many for each
// sign. What is closer to zero counts as +-2^-31.
template <>
struct Buckets<256> {
  static constexpr int kNumber = 4096;
  static constexpr int kShift = 23 - 6;  // of the 23 bits of the mantissa 6 are kept

  // The bits above the shift are 2048 to 4095, modulo 4096, for magnitudes from 2^-31 to 2. Turned
  // over they are 2047 to 0: so the buckets of negative values rise from 0 to 2047.
  __device__ static uint32_t of(float value) {
    const uint32_t magnitude = __float_as_uint(fmaxf(fabsf(value), 0x1p-31f));
    const uint32_t sign = __float_as_int(value) >> 31;  // all bits, or none
    return ((magnitude >> kShift) ^ sign) % kNumber;
  }

  __device__ static int of_any(float value) {
    if (fabsf(value) < 2.0f) return of(value);
    return value < 0.0f ? -1 : kNumber;
  }
};

// Lies in shared memory.
template <int kLevels>
struct NearestTable {
  static constexpr int kBits = kLevels == 16 ? 4 : 8;

  struct Entry {
    float threshold;
    // In the uppermost kBits bits the code up to the threshold, in the next ones that above it.
    uint32_t codes;
  };
  Entry entries[Buckets<kLevels>::kNumber];
  int bucket_of[kLevels];  // of each threshold

  // Called by all threads of a thread block, when the decisions are filled. True to all of them if
  // the table can be used: if no bucket has more than one threshold.
  __device__ bool fill(const Decisions<kLevels>& decisions) {
    if (threadIdx.x < kLevels) {
      bucket_of[threadIdx.x] = Buckets<kLevels>::of_any(decisions.thresholds[threadIdx.x]);
    }
    __syncthreads();
    bool is_right = true;
    for (int bucket = threadIdx.x; bucket < Buckets<kLevels>::kNumber; bucket += kThreads) {
      const int below = count<kLevels>([=](int i) { return bucket_of[i] < bucket; });
      int above = below;
      float threshold = __int_as_float(0x7f800000);  // infinity: nothing is above it
      if (is_in(bucket, below)) {
        threshold = decisions.thresholds[below];
        while (above < kLevels - 1 && decisions.thresholds[above] == threshold) ++above;
        is_right = is_right && !is_in(bucket, above);
      }
      const uint32_t codes = decisions.codes[below] << kBits | decisions.codes[above];
      entries[bucket] = {threshold, codes << (32 - 2 * kBits)};
    }
    return __syncthreads_and(is_right);
  }

  // The code of a number from -1 to 1 (or a rounding beyond) in the uppermost bits; below them
  // there may be anything.
  __device__ uint32_t code(float value) const {
    const Entry entry = entries[Buckets<kLevels>::of(value)];
    return value > entry.threshold ? entry.codes << kBits : entry.codes;
  }

 private:
  // The last threshold is infinite: there is no level above.
  __device__ bool is_in(int bucket, int position) const {
    return position < kLevels - 1 && bucket_of[position] == bucket;
  }
};

}  // namespace qlora
