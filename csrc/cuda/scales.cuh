// The scale of each block of a 4-bit tensor: a float, or a code of 8 bits (double quantisation).

#pragma once

#include <cstdint>

namespace qlora {

// What is loaded of a scale: the float or the code, and the scale of the code.
struct StoredScale {
  uint32_t bits;
  float nested_absmax;
};

struct Scales {
  const void* absmax;            // (blocks) float, or uint8_t codes where nested_absmax is not null
  const float* nested_absmax;    // (ceil(blocks / 256)) or null
  const float* nested_codebook;  // (256) or null
  const float* offset;           // (1) or null

  static constexpr int kNestedBlock = 256;

  // Each step rounded by itself: the same bits as on the CPU.
  template <bool kNested>
  __device__ float at(int64_t block) const {
    if (!kNested) return static_cast<const float*>(absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(absmax)[block];
    return restore(code, nested_absmax[block / kNestedBlock]);
  }

  // The same in two parts, so that nothing waits for the first one where many are loaded ahead.
  __device__ StoredScale load(int64_t block) const {
    if (nested_absmax == nullptr) return {static_cast<const uint32_t*>(absmax)[block], 0.0f};
    return {static_cast<const uint8_t*>(absmax)[block], nested_absmax[block / kNestedBlock]};
  }

  __device__ float restore(StoredScale stored) const {
    if (nested_absmax == nullptr) return __uint_as_float(stored.bits);
    return restore(stored.bits, stored.nested_absmax);
  }

 private:
  __device__ float restore(uint32_t code, float scale) const {
    return __fadd_rn(__fmul_rn(nested_codebook[code], scale), *offset);
  }
};

}  // namespace qlora
