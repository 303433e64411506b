// 8-bit codes to values: look up, scale, round once.

#include "dequantize.cuh"

int qlora::dequantize_8bit(const uint8_t* codes, const float* absmax, const float* codebook,
                           int64_t block_size, int64_t n, void* y, int dtype, Execution how) {
  const Scales scales(absmax, nullptr, nullptr, nullptr);
  return dequantize<256, false>(codes, scales, codebook, block_size, n, y, dtype, how);
}
