// The scales of a 4-bit tensor, double-quantised or not.

#pragma once

#include <algorithm>

#include "simd.h"

namespace qlora {

// The scale of each block: a float, or a code of 8 bits that is restored in two roundings.
struct Scales {
  const void* absmax;  // float, or uint8_t when nested
  const float* nested_absmax;
  const float* nested_codebook;
  const float* offset;

  static constexpr int kNestedBlock = 256;

  float operator[](int64_t block) const {
    if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(absmax)[block];
    return nested_codebook[code] * nested_absmax[block / kNestedBlock] + *offset;
  }

  // The scales of `count` blocks.
  void restore(int64_t first, int64_t count, float* scales) const {
    if (nested_absmax == nullptr) {
      const float* from = static_cast<const float*>(absmax) + first;
      for_each_vector(count,
                      [=](int64_t i, auto part) { store(scales + i, load(from + i, part), part); });
      return;
    }
    const Floats added = broadcast(*offset);
    for (const int64_t end = first + count; first < end;) {
      const int64_t nested = first / kNestedBlock;
      const int64_t here = std::min(end, (nested + 1) * kNestedBlock) - first;
      const uint8_t* codes = static_cast<const uint8_t*>(absmax) + first;
      const Floats scale = broadcast(nested_absmax[nested]);
      for_each_vector(here, [=](int64_t i, auto part) {
        store(scales + i, look_up(nested_codebook, codes + i, part) * scale + added, part);
      });
      first += here;
      scales += here;
    }
  }

  void prefetch_blocks(int64_t first, int64_t count) const {
    const int64_t size = nested_absmax == nullptr ? sizeof(float) : sizeof(uint8_t);
    const char* start = static_cast<const char*>(absmax) + first * size;
    prefetch_bytes(start, count * size);
  }
};

}  // namespace qlora
