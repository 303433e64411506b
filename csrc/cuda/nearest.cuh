// The nearest level by one look-up and one comparison.
//
// Normalised values, from -1 to 1, are cut into buckets so narrow that no more than one threshold
// lies in each. A bucket's entry has that threshold, and the codes below and above it.

#pragma once

#include "blockwise.cuh"

namespace qlora {

// The buckets for kLevels levels, of values times kScale. `slot_of` says where a value's bucket
// lies in the table, `rank` which one it is: that never falls as the value rises, and both are used
// for values and for thresholds alike, which is all that a table needs to be right. `of_any` may be
// outside of 0 to kNumber - 1 for thresholds that no value reaches. Where neither levels nor values
// have signs their buckets may be narrower.
template <int kLevels, bool kHasSign = true>
struct Buckets;

// Of equal width.
template <>
struct Buckets<16> {
  static constexpr int kNumber = 512;
  static constexpr float kScale = 1.0f;

  // 2^23 + 2^22 + 256 as a float: at this size the last bit of a float counts ones, so that adding
  // rounds to a whole number and leaves it, plus 256, in the lower bits.
  static constexpr float kRounder = 12583168.0f;
  static constexpr uint32_t kRounderBits = 0x4b400000;

  __device__ static uint32_t slot_of(float value) {
    return __float_as_uint(__fmaf_rn(value, 255.0f, kRounder)) % kNumber;
  }

  __device__ static int rank(int slot) { return slot; }

  __device__ static int of_any(float value) {
    const float near = fminf(fmaxf(value, -2.0f), 2.0f);
    return __float_as_uint(__fmaf_rn(near, 255.0f, kRounder)) - kRounderBits;
  }
};

// By the upper bits of a float16, to which values round: sign, exponent and 6 bits of the mantissa,
// or exponent and 7 bits. So there are 64 (or 128) buckets for each power of two, for each sign.
// The scale brings 1 to 2^15: there are buckets from 2^-29 on, and as many of equal width below.
// The dynamic map without signs needs the narrow ones.
template <bool kHasSign>
struct Buckets<256, kHasSign> {
  static constexpr int kNumber = 4096;
  static constexpr float kScale = 32768.0f;

  // The shift is hidden from the compiler, which would else make two instructions of it and of the
  // product with the size of an entry; a load multiplies by itself.
  __device__ static uint32_t slot_of(float value) {
    const uint32_t bits = same_bits<uint32_t>(__floats2half2_rn(value, 0.0f));
    uint32_t slot;
    asm("shr.u32 %0, %1, %2;" : "=r"(slot) : "r"(bits), "n"(kHasSign ? 4 : 3));
    return slot;
  }

  // Slots are numbered by sign and magnitude.
  __device__ static int rank(int slot) {
    if (!kHasSign) return slot;
    return slot < kNumber / 2 ? kNumber / 2 + slot : kNumber - 1 - slot;
  }

  __device__ static int of_any(float value) {
    const bool is_in = kHasSign || value >= 0.0f;
    if (is_in && fabsf(value) < 2.0f * kScale) return rank(slot_of(value));
    return value < 0.0f ? -1 : kNumber;
  }
};

// Lies in shared memory.
template <int kLevels, bool kHasSign = true>
struct NearestTable {
  using Bucket = Buckets<kLevels, kHasSign>;
  static constexpr int kBits = kLevels == 16 ? 4 : 8;

  struct Entry {
    float threshold;
    // In the uppermost kBits bits the code up to the threshold, in the next ones that above it.
    uint32_t codes;
  };
  Entry entries[Bucket::kNumber];
  int bucket_of[kLevels];  // of each threshold

  // What values are multiplied by before they are looked up, or 0 where the table cannot serve:
  // where absmax is 0, tiny, infinite or NaN.
  __device__ static float factor(float absmax) {
    const float factor = 1.0f / absmax * Bucket::kScale;
    return factor > 0.0f && !isinf(factor) ? factor : 0.0f;
  }

  // Called by all threads of a thread block, when the decisions are filled. True to all of them if
  // the table can be used: if no bucket has more than one threshold. (And if none is so close to 0
  // that a value's own rounding there would decide, which the scale changes. Without signs, if no
  // level has one, so that thresholds are positive.)
  __device__ bool fill(const Decisions<kLevels>& decisions) {
    bool is_right = true;
    if (threadIdx.x < kLevels) {
      const float threshold = decisions.thresholds[threadIdx.x];
      bucket_of[threadIdx.x] = Bucket::of_any(threshold * Bucket::kScale);
      is_right = Bucket::kScale == 1.0f || fabsf(threshold) >= 0x1p-126f;
      if (!kHasSign && decisions.levels[threadIdx.x] < 0.0f) is_right = false;
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < Bucket::kNumber; slot += kThreads) {
      const int bucket = Bucket::rank(slot);
      const int below = count<kLevels>([=](int i) { return bucket_of[i] < bucket; });
      int above = below;
      float threshold = __int_as_float(0x7f800000);  // infinity: nothing is above it
      if (is_in(bucket, below)) {
        threshold = decisions.thresholds[below];
        while (above < kLevels - 1 && decisions.thresholds[above] == threshold) ++above;
        is_right = is_right && !is_in(bucket, above);
      }
      const uint32_t codes = decisions.codes[below] << kBits | decisions.codes[above];
      entries[slot] = {threshold * Bucket::kScale, codes << (32 - 2 * kBits)};
    }
    return __syncthreads_and(is_right);
  }

  // The code of a number from -1 to 1 (or a rounding beyond), times the scale, in the uppermost
  // bits; below them there may be anything.
  __device__ uint32_t code(float value) const {
    const Entry entry = entries[Bucket::slot_of(value)];
    return value > entry.threshold ? entry.codes << kBits : entry.codes;
  }

 private:
  // The last threshold is infinite: there is no level above.
  __device__ bool is_in(int bucket, int position) const {
    return position < kLevels - 1 && bucket_of[position] == bucket;
  }
};

}  // namespace qlora
