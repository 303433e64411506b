// 8-bit codes to values: look up, scale, round once.

#include "levels_256.h"

int qlora::dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                           int64_t block_size, int64_t n, void* y, int dtype, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  const Table256 levels(codebook);
  return with_dtype(dtype, [&](auto type) {
    auto* values = static_cast<decltype(type)*>(y);
    for_each_block(n, block_size, threads, [&](int64_t block, int64_t start, int64_t count) {
      dequantize_block_8bit(codes + start, count, absmax[block], levels, values + start);
    });
    return kOk;
  });
}
