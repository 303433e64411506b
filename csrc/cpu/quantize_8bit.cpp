// Values to 8-bit codes: a block's absmax, the nearest of 256 levels.

#include "levels_256.h"

int qlora::quantize_8bit(const void* x, int dtype, int64_t n, const float* codebook,
                         int64_t block_size, uint8_t* codes, float* absmax, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  const NearestOf256 nearest(codebook);
  return with_dtype(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(x);
    for_each_block(n, block_size, threads, [&](int64_t block, int64_t start, int64_t count) {
      absmax[block] = quantize_block_8bit(values + start, count, nearest, codes + start);
    });
    return kOk;
  });
}
