// The scale of each block of a 4-bit tensor: a float, or a code of 8 bits (double quantisation).

#pragma once

#include <cstdint>

namespace qlora {

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
    return __fadd_rn(__fmul_rn(nested_codebook[code], nested_absmax[block / kNestedBlock]),
                     *offset);
  }
};

}  // namespace qlora
